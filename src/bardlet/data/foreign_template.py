"""The chat template of a model from elsewhere: its own special tokens, rendered by Jinja in a sandbox.

Text of a message never becomes a special token: the template is rendered with a mark in place of each content, and only
what the template itself wrote is searched for special tokens. Otherwise the ids are those of transformers'
`apply_chat_template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bardlet.data.forms import Message
from bardlet.errors import BardletError, one_line
from bardlet.tokenizer import Tokenizer

MARK = re.compile("\ue000([0-9]+)\ue001")
"""Stands for the content of a message, by its number; private characters that no text has."""


class _Generation(Extension):
    """The tag {% generation %}, which only marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _raise(message: str) -> None:
    raise TemplateError(message)


class ForeignTemplate:
    """A chat template in Jinja, with the tokenizer that it belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raise BardletError if the template cannot be used, with the reason."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.globals.update(raise_exception=_raise)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self.template = environment.from_string(str(tokenizer.chat_template))
        except TemplateError as error:
            raise BardletError(f"the model's chat template cannot be read ({one_line(error)})") from None
        self.tokenizer = tokenizer
        self.ids = {token: i for i, token in tokenizer.special.items()}
        self.special = re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or r"(?!)")
        self.end_ids = self._find_ends()

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, answer): see `chat_template.encode`. The special token after an answer belongs to it."""
        ids: list[int] = []
        learned: list[bool] = []
        text = ""  # since the last special token
        spans: list[tuple[int, int]] = []  # (start, end) of the answers in it
        after_answer = False

        def flush() -> None:
            nonlocal text, spans
            encoding = self.tokenizer.inner.encode(text, add_special_tokens=False)
            ids.extend(encoding.ids)
            learned.extend(any(start < to and end > begin for begin, to in spans) for start, end in encoding.offsets)
            text, spans = "", []

        for part, message in self._parts(messages, add_generation_prompt):
            if message is not None:
                after_answer = message["role"] == "assistant" and message.get("weight", 1) != 0
                if after_answer:
                    spans.append((len(text), len(text) + len(part)))
                text += part
                continue
            position = 0
            for match in self.special.finditer(part):
                text += part[position : match.start()]
                flush()
                ids.append(self.ids[match[0]])
                learned.append(after_answer)
                after_answer, position = False, match.end()
            text += part[position:]
        flush()
        return np.array(ids, np.int64), np.array(learned, bool)

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[tuple[str, Message | None]]:
        """Return (text, message) of each part of the rendered template; the message is None for the template's own."""
        marked = [{"role": message["role"], "content": f"\ue000{n}\ue001"} for n, message in enumerate(messages)]
        try:
            text = self.template.render(messages=marked, add_generation_prompt=add_generation_prompt,
                                        bos_token=self.tokenizer.eos if self.tokenizer.eos_id is not None else "",
                                        eos_token=self.tokenizer.eos, enable_thinking=False)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BardletError(f"the model's chat template rejects the conversation ({one_line(error)})") from None
        pieces = MARK.split(text)  # template, number, template, number, ..., template
        seen = [int(number) for number in pieces[1::2]]
        if seen != list(range(len(messages))):
            raise BardletError("the model's chat template leaves out or reorders messages")
        parts: list[tuple[str, Message | None]] = []
        for i, piece in enumerate(pieces):
            message = messages[int(piece)] if i % 2 else None
            parts.append((str(message["content"]), message) if message else (piece, None))
        return parts

    def _find_ends(self) -> list[int]:
        """Return the ids that end an answer: the special token after it, and the end of the text."""
        answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        after = self._parts(answer, False)[-1][0]
        first = self.special.search(after)
        ends = {self.ids[first[0]]} if first else set()
        return sorted(ends | ({self.tokenizer.eos_id} if self.tokenizer.eos_id is not None else set()))


@lru_cache(maxsize=8)
def of(tokenizer: Tokenizer) -> ForeignTemplate:
    """Return the template of a tokenizer. BardletError if it cannot be used."""
    return ForeignTemplate(tokenizer)
