"""Answers of /v1/chat/completions. Imports torch: see `generation`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.inference.answers import stop_ids
from bardlet.server import logprobs
from bardlet.server.completion import refuse_translator
from bardlet.server.errors import Refusal
from bardlet.server.generation import Plan, Prompt, Sequences, identity
from bardlet.server.models import Loaded, Models
from bardlet.server.reply import Context, Reply
from bardlet.server.schema import ChatMessage, ChatRequest
from bardlet.server.text import Entry


class Chat:
    """The answers to one conversation."""

    def __init__(self, models: Models, loaded: Loaded, body: ChatRequest, context: Context) -> None:
        self.models, self.loaded, self.body, self.context = models, loaded, body, context
        self.tokenizer = loaded.model.tokenizer

    async def answer(self, reply: Reply) -> None:
        """Send the answers."""
        refuse_translator(self.loaded)
        ids = await asyncio.to_thread(self._encode)
        prompts = [Prompt(ids, len(ids), in_character=False)]
        space = self.loaded.window - len(ids)
        asked = self.body.max_tokens if self.body.max_completion_tokens is None else self.body.max_completion_tokens
        plan = Plan(max_tokens=space if asked is None else min(asked, space), top=self._top(),
                    stop_ids=frozenset(stop_ids(self.tokenizer)))
        with Sequences(self.models, self.loaded, self.body, self.context) as sequences:
            sequences.submit(prompts, plan)
            if self.body.stream:
                await self._stream(reply, sequences, prompts)
                return
            choices = [{"index": index, "finish_reason": one.finish_reason,
                        "logprobs": await asyncio.to_thread(self._logprobs, one.entries),
                        "message": {"role": "assistant", "content": one.text, "refusal": None}}
                       for index, one in enumerate(await sequences.whole())]
            await reply.json({**identity("chatcmpl", "chat.completion", self.loaded.name), "choices": choices,
                              "usage": sequences.usage(prompts)})

    async def _stream(self, reply: Reply, sequences: Sequences, prompts: Sequence[Prompt]) -> None:
        options = self.body.stream_options
        with_usage = bool(options and options.include_usage)
        head = {**identity("chatcmpl", "chat.completion.chunk", self.loaded.name),
                **({"usage": None} if with_usage else {})}

        async def send(index: int, delta: dict[str, Any], **facts: Any) -> None:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **facts}
            await reply.event({**head, "choices": [choice]})

        for index in range(self.body.n or 1):
            await send(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, news in sequences.news():
            if news.text or news.entries:
                await send(index, {"content": news.text}, logprobs=self._logprobs(news.entries))
            if news.reason is not None:
                await send(index, {}, finish_reason=news.reason)
        if with_usage:
            await reply.event({**head, "choices": [], "usage": sequences.usage(prompts)})
        await reply.done()

    def _encode(self) -> list[int]:
        """Return the ids of the conversation. In a worker thread: it may have millions of characters."""
        if reason := chat_template.reason_against(self.tokenizer):
            raise Refusal(400, f"{self.loaded.name} cannot chat: {self.loaded.public(BardletError(reason))}; use "
                          "/v1/completions, or fine-tune it with `bardlet sft`", param="model", code="no_chat_template")
        messages: Any = [{"role": "system" if each.role == "developer" else each.role, "content": text_of(each)}
                         for each in self.body.messages]
        try:
            ids = chat_template.encode(self.tokenizer, messages, add_generation_prompt=True)[0].tolist()
        except BardletError as error:
            raise Refusal(400, f"messages: {self.loaded.public(error)}", param="messages",
                          code="invalid_value") from None
        if len(ids) >= self.loaded.window:
            raise Refusal(400, f"the messages have {len(ids):,} tokens, but the model's context window has "
                          f"{self.loaded.window:,}, the answer included; shorten them", param="messages",
                          code="context_length_exceeded")
        return [int(i) for i in ids]

    def _top(self) -> int | None:
        return self.body.top_logprobs or 0 if self.body.logprobs else None

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        top = self._top()
        return None if top is None else logprobs.of_chat(self.tokenizer, entries, top)


def text_of(message: ChatMessage) -> str:
    """Return the content of a message; its parts become lines."""
    content = message.content
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
