"""A conversation with a model, or a text that a person and a model write in turn.

A model that was fine-tuned answers: its context is the conversation as the chat template writes it. A base only goes on
with a text, and does that here.
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
    """What was said so far, and the model that says the rest.

    answers: whether the model was fine-tuned to answer; if not, it goes on with the text. forgotten: how many messages
    from the beginning the model does not see any more: they do not fit into its context, or the text had ended. began:
    how many that were before a text ended with the last answer, which may be asked for again.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, system: str = "", tokens: int = 256, seed: int = 0,
                 documents: int = 2, **options: Any) -> None:
        """tokens: at most so many for an answer. documents: of how many the base's text consisted. options: those of
        `generate.stream`."""
        self.model, self.words, self.system, self.options, self.seed = model, tokenizer, system, options, seed
        self.documents, self.answers = documents, tokenizer.chat_template == chat_template.TEMPLATE
        self.tokens = min(tokens, model.config.block_size // 2)
        self.messages: list[dict[str, str]] = []
        self.forgotten = self.began = 0

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; what came of it stays in `messages` if the iterator is closed early.

        Raises:
            BardletError: `text` alone is longer than the context.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except BardletError:
            self.messages.pop()
            raise
        return self._answer(prompt)

    def regenerate(self) -> Iterator[str]:
        """Another answer to what was asked last. BardletError where nothing was."""
        if not self.messages:
            raise BardletError("nothing was said yet")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            if self.forgotten > len(self.messages):  # the text had ended with that answer
                self.forgotten = self.began
        self.seed += 1
        return self._answer(self._prompt())

    def clear(self) -> None:
        """Forget all that was said, but for the system's message."""
        self.messages, self.forgotten, self.began = [], 0, 0

    def save(self, path: Path) -> None:
        """The conversation as a line of JSON, which `bardlet sft` reads, at the end of a file."""
        if not self.messages:
            raise BardletError("there is nothing to save: nothing was said yet")
        line = json.dumps({"messages": self.transcript()}, ensure_ascii=False) + "\n"
        with atomic.explain_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line)

    def transcript(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def _prompt(self) -> list[int]:
        """The tokens of what was said, without so much of its beginning that an answer has room behind it."""
        room = self.model.config.block_size - self.tokens
        if not self.answers:
            return self._text()[-room:]
        said = self.transcript()
        first = len(said) - len(self.messages)
        for forgotten, message in enumerate(self.messages):
            if message["role"] != "user":  # what is left begins with a question
                continue
            frame = chat_template.encode(self.words, [*said[:first], *said[first + forgotten :]], ask=True)[0]
            if len(frame) <= room:
                self.forgotten = forgotten
                return [int(i) for i in frame]
        what = "that, with what the system says," if self.system else "that"
        raise BardletError(f"{what} is too long: {len(frame):,} tokens; beside an answer of {self.tokens} the model's "
                           f"window of {self.model.config.block_size} has room for {room}; say it shorter")

    def _text(self) -> list[int]:
        """The text that a base goes on with: each message a line of its own, unless it begins with white space."""
        text = self.system if not self.forgotten else ""
        for message in self.messages[self.forgotten :]:
            said = message["content"]
            apart = message["role"] == "user" and text and not text[-1].isspace() and not said[:1].isspace()
            text += "\n" + said if apart else said
        ids = text_generation.prompt_ids(self.words, text, self.documents)
        begins = self.words.eos_id is not None and self.documents > 1 and bool(text)
        return [int(self.words.eos_id or 0), *ids] if begins else ids  # where a document begins

    def _answer(self, prompt: list[int]) -> Iterator[str]:
        decoder, said = StreamDecoder(self.words, skip_special=True), ""
        if not self.answers:
            for known in prompt:  # a prompt may end inside a character
                decoder.feed(known)
        stops = answers.stop_ids(self.words) if self.answers else [i for i in (self.words.eos_id,) if i is not None]
        stream = generate.stream(self.model, [prompt], self.tokens, seed=[self.seed + len(self.messages)],
                                 stop_ids=stops, **self.options)
        ended = False
        try:
            with closing(stream):  # type: ignore[type-var]
                for [token] in stream:
                    ended = token in stops
                    if token is not None and token < self.words.vocab_size:
                        piece = decoder.feed(token)
                        said += piece
                        yield piece
            said += (last := decoder.finish())
            yield last
        except BardletError:
            raise  # nothing was said
        except BaseException:  # stopped: by whoever reads, or by Ctrl-C
            self.messages.append({"role": "assistant", "content": said})
            raise
        self.messages.append({"role": "assistant", "content": said})
        if ended and not self.answers:
            # the text is at its end: what comes next begins another
            self.began, self.forgotten = self.forgotten, len(self.messages)
