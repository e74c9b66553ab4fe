"""Answers of /v1/completions. Imports torch: see `generation`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from bardlet.errors import BardletError
from bardlet.inference import text_generation
from bardlet.server import logprobs
from bardlet.server.errors import Refusal
from bardlet.server.generation import Plan, Prompt, Sequences, identity
from bardlet.server.models import Loaded, Models
from bardlet.server.reply import Context, Reply
from bardlet.server.schema import CompletionRequest
from bardlet.server.text import Entry, entries_of

MAX_ECHO = 1_000_000
"""Characters of prompts that an answer repeats."""
DEFAULT_TOKENS = 16
"""Tokens of a completion without max_tokens, as in the OpenAI API."""


class Completions:
    """The completions of one request."""

    def __init__(self, models: Models, loaded: Loaded, body: CompletionRequest, context: Context) -> None:
        self.models, self.loaded, self.body, self.context = models, loaded, body, context
        self.tokenizer = loaded.model.tokenizer
        self.max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        self.scores_prompt = bool(body.echo) and body.logprobs is not None
        self.prompts: list[Prompt] = []
        self.texts: list[str] = []
        """The text of each prompt, if it is returned."""

    async def answer(self, reply: Reply) -> None:
        """Send the completions."""
        refuse_translator(self.loaded)
        await asyncio.to_thread(self._read_prompts)
        with Sequences(self.models, self.loaded, self.body, self.context) as sequences:
            if self.max_tokens or self.scores_prompt:
                stop_ids = frozenset(self.tokenizer.stop_ids)
                sequences.submit(self.prompts, Plan(max_tokens=self.max_tokens, stop_ids=stop_ids,
                                                    top=self.body.logprobs, prompt_logprobs=self.scores_prompt))
            await (self._stream if self.body.stream else self._send)(reply, sequences)

    async def _send(self, reply: Reply, sequences: Sequences) -> None:
        n = self.body.n or 1
        written = await sequences.whole()
        choices = []
        for index in range(len(self.prompts) * n):
            before = self.texts[index // n] if self.body.echo else ""
            if not written:  # nothing was to be written
                choices.append(self._choice(index, before, [], [], "length"))
                continue
            one = written[index]
            choices.append(await asyncio.to_thread(self._choice, index, before + one.text, one.prompt, one.entries,
                                                   one.finish_reason))
        await reply.json({**self._identity(), "choices": choices, "usage": sequences.usage(self.prompts)})

    async def _stream(self, reply: Reply, sequences: Sequences) -> None:
        n, options = self.body.n or 1, self.body.stream_options
        with_usage = bool(options and options.include_usage)
        head = {**self._identity(), **({"usage": None} if with_usage else {})}
        for index in range(len(self.prompts) * n if self.body.echo and not self.scores_prompt else 0):
            before = self.texts[index // n]
            await reply.event({**head, "choices": [self._choice(index, before, [], [], None)]})
        if not self.max_tokens and not self.scores_prompt:
            for index in range(len(self.prompts) * n):
                await reply.event({**head, "choices": [self._choice(index, "", [], [], "length")]})
        async for index, news in sequences.news():
            before = self.texts[index // n] if news.prompt is not None else ""
            choice = self._choice(index, before + news.text, news.prompt or [], news.entries, news.reason)
            await reply.event({**head, "choices": [choice]})
        if with_usage:
            await reply.event({**head, "choices": [], "usage": sequences.usage(self.prompts)})
        await reply.done()

    def _identity(self) -> dict[str, Any]:
        return identity("cmpl", "text_completion", self.loaded.name)

    def _choice(self, index: int, text: str, prompt: Sequence[Entry], entries: Sequence[Entry],
                reason: str | None) -> dict[str, Any]:
        """Return a choice, or its next chunk."""
        table = None
        if (top := self.body.logprobs) is not None:
            offset = len(self.texts[index // (self.body.n or 1)]) if self.body.echo else 0
            first, rest = (logprobs.of_completion(self.tokenizer, part, top, start)
                           for part, start in ((prompt, 0), (entries, offset)))
            table = {name: None if first[name] is None else [*first[name], *rest[name]] for name in first}
        return {"index": index, "text": text, "logprobs": table, "finish_reason": reason}

    # ---------------------------------------------------------------- prompts

    def _read_prompts(self) -> None:
        """Encode the prompts, or check their ids. In a worker thread: a prompt may have millions of characters."""
        prompt: Any = "" if self.body.prompt is None else self.body.prompt
        alone = isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], int))
        for each in [prompt] if alone else prompt:
            ids, hidden = self._encode(each) if isinstance(each, str) else (checked_ids(self.loaded, each, "prompt"), 0)
            if self.scores_prompt and len(ids) > self.loaded.window:
                raise Refusal(400, f"the prompt has {len(ids):,} tokens, but the model's context window has "
                              f"{self.loaded.window:,}, and echo with logprobs scores the whole prompt; shorten it",
                              param="prompt", code="context_length_exceeded")
            echoes_ids = self.body.echo and not isinstance(each, str)
            text, entries = entries_of(self.tokenizer, ids, hidden) if self.scores_prompt or echoes_ids else (each, [])
            self.texts.append(text if self.body.echo else "")
            self.prompts.append(Prompt(ids[-self.loaded.window :], len(ids), entries if self.scores_prompt else ()))
        if sum(map(len, self.texts)) * (self.body.n or 1) > MAX_ECHO:
            raise Refusal(400, f"echo returns at most {MAX_ECHO:,} characters of prompts, all choices together; leave "
                          "echo out, or shorten the prompts", param="echo", code="invalid_value")

    def _encode(self, text: str) -> tuple[list[int], int]:
        """Return (the ids of a prompt as `bardlet sample` reads it, the number of them that begin a document).

        Without log-probabilities of the prompt, that number does not matter.
        """
        model = self.loaded.model
        try:
            ids = model.prompt_ids(text)
            needed = text and self.scores_prompt
            plain = text_generation.prompt_ids(self.tokenizer, text, model.documents) if needed else []
        except BardletError as error:
            raise Refusal(400, f"prompt: {self.loaded.public(error)}", param="prompt", code="invalid_value") from None
        return ids, len(ids) - len(plain)


def refuse_translator(loaded: Loaded) -> None:
    """Refuse an encoder-decoder, which continues no text."""
    if loaded.slot is None:
        raise Refusal(400, f"{loaded.name}: an encoder-decoder, which translates; use /translate", param="model",
                      code="model_not_supported")


def checked_ids(loaded: Loaded, ids: Sequence[int], param: str) -> list[int]:
    """Return token ids. Refuse one that the model does not have."""
    size = int(loaded.model.module.config.vocab_size)
    if (largest := max(ids, default=0)) >= size:
        raise Refusal(400, f"{param}: token id {largest} is not in the vocabulary, whose ids are 0 to {size - 1}",
                      param=param, code="invalid_value")
    return list(ids)
