"""A conversation with a model.

A fine-tuned model answers: its context is the conversation as the chat template formats it. A base model continues a
text: the user and the model write it in turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.inference import answers, generate, text_generation
from bardlet.runtime import atomic
from bardlet.tokenizer import StreamDecoder, Tokenizer


class ChatSession:
    """The messages so far, and the model that answers them.

    uses_template: True if the tokenizer has bardlet's chat template; otherwise the model continues the text.
    forgotten: number of messages dropped from the start, because they do not fit into the context window or the base
    model ended its document. forgotten_before: `forgotten` before the last answer ended a document, for `regenerate`.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, system: str = "", tokens: int = 256, seed: int = 0,
                 documents: int = 2, **options: Any) -> None:
        """tokens: maximum length of an answer. documents: number of documents in a base model's training text.
        options: see `generate.stream`."""
        self.model, self.tokenizer, self.system, self.options, self.seed = model, tokenizer, system, options, seed
        self.documents, self.uses_template = documents, chat_template.reason_against(tokenizer) is None
        self.tokens = min(tokens, model.config.block_size // 2)
        self.messages: list[dict[str, str]] = []
        self.forgotten = self.forgotten_before = 0

    def ask(self, text: str) -> Iterator[str]:
        """Return the answer to `text` as a stream; closed early, it leaves the partial answer in `messages`.

        Raises:
            BardletError: `text` alone does not fit into the context window.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except BardletError:
            self.messages.pop()
            raise
        return self._answer(prompt)

    def regenerate(self) -> Iterator[str]:
        """Return another answer to the last message. BardletError if there is none."""
        if not self.messages:
            raise BardletError("the conversation is empty; ask something first")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            if self.forgotten > len(self.messages):  # that answer had ended the document
                self.forgotten = self.forgotten_before
        self.seed += 1
        return self._answer(self._prompt())

    def clear(self) -> None:
        """Delete all messages except the system message."""
        self.messages, self.forgotten, self.forgotten_before = [], 0, 0

    def save(self, path: Path) -> None:
        """Append the conversation to a file, as a line of JSON that `bardlet sft` reads."""
        if not self.messages:
            raise BardletError("the conversation is empty, so there is nothing to save; ask something first")
        line = json.dumps({"messages": self.transcript()}, ensure_ascii=False) + "\n"
        with atomic.explain_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line)

    def transcript(self) -> list[dict[str, str]]:
        """Return all messages, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _prompt(self) -> list[int]:
        """Return the tokens of the conversation, without its first messages if the answer would not fit otherwise."""
        max_prompt = self.model.config.block_size - self.tokens
        if not self.uses_template:
            start, text = len(self.tokenizer.prefix_ids), self._text()
            return [*text[:start], *text[start:][-(max_prompt - start) :]]
        messages = self.transcript()
        first = len(messages) - len(self.messages)
        for forgotten, message in enumerate(self.messages):
            if message["role"] != "user":  # the kept part starts with a question
                continue
            ids = chat_template.encode(self.tokenizer, [*messages[:first], *messages[first + forgotten :]],
                                       add_generation_prompt=True)[0]
            if len(ids) <= max_prompt:
                self.forgotten = forgotten
                return [int(i) for i in ids]
        prompt = "the message, with the system message," if self.system else "the message"
        raise BardletError(f"{prompt} is too long: {len(ids):,} tokens, but {max_prompt} fit in the model's window of "
                           f"{self.model.config.block_size}, with {self.tokens} reserved for the answer; shorten it")

    def _text(self) -> list[int]:
        """Return the text that a base model continues: a line per message, unless it starts with white space."""
        text = self.system if not self.forgotten else ""
        for message in self.messages[self.forgotten :]:
            content = message["content"]
            new_line = message["role"] == "user" and text and not text[-1].isspace() and not content[:1].isspace()
            text += "\n" + content if new_line else content
        ids = text_generation.prompt_ids(self.tokenizer, text, self.documents)
        separated = self.tokenizer.eos_id is not None and self.documents > 1 and bool(text)
        if not separated or self.tokenizer.prefix_ids:
            return ids
        return [int(self.tokenizer.eos_id or 0), *ids]  # documents start with the separator

    def _answer(self, prompt: list[int]) -> Iterator[str]:
        decoder, answer = StreamDecoder(self.tokenizer, skip_special=True), ""
        if not self.uses_template:
            for prompt_token in prompt:  # the prompt may end inside a multi-byte character
                decoder.feed(prompt_token)
        stops = answers.stop_ids(self.tokenizer) if self.uses_template else list(self.tokenizer.stop_ids)
        stream = generate.stream(self.model, [prompt], self.tokens, seed=[self.seed + len(self.messages)],
                                 stop_ids=stops, **self.options)
        ended = False
        try:
            with closing(stream):
                for [token] in stream:
                    ended = token in stops
                    if token is not None and token < self.tokenizer.vocab_size:
                        piece = decoder.feed(token)
                        answer += piece
                        yield piece
            answer += (last := decoder.finish())
            yield last
        except BardletError:
            raise  # there is no answer to keep
        except BaseException:  # closed by the caller, or Ctrl-C
            self.messages.append({"role": "assistant", "content": answer})
            raise
        self.messages.append({"role": "assistant", "content": answer})
        if ended and not self.uses_template:
            # the document has ended: the next message starts a new one
            self.forgotten_before, self.forgotten = self.forgotten, len(self.messages)
