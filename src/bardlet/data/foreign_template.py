"""The chat template of a model from elsewhere: its own special tokens, rendered by Jinja in a sandbox.

Text of a message never becomes a special token: the template is rendered with a mark in place of each content, and only
what the template itself wrote is searched for special tokens. Otherwise the ids are those of transformers'
`apply_chat_template`: a second rendering, of the contents, shows how the template changes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bardlet.data.forms import Message
from bardlet.errors import BardletError, one_line
from bardlet.tokenizer import Tokenizer
from bardlet.tokenizer.pipeline import start_only

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


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


Part = tuple[str, Message | None]
"""A part of a rendered conversation, and the message whose text it is; None for what the template itself wrote."""


class ForeignTemplate:
    """A chat template in Jinja, with the tokenizer that it belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raise BardletError if the template cannot be used, with the reason."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        environment.filters["tojson"] = _to_json
        try:
            self.template = environment.from_string(str(tokenizer.chat_template))
        except TemplateError as error:
            raise BardletError(f"the model's chat template cannot be read ({one_line(error)})") from None
        self.tokenizer = tokenizer
        self.ids = {token: i for i, token in tokenizer.special.items()}
        self.special = re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or r"(?!)")
        self.inside = _after_special(tokenizer)
        self.end_ids = self._find_ends()

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, answer): see `chat_template.encode`.

        The special token after an answer belongs to it, with the white space before that token.
        """
        ids: list[int] = []
        learned: list[bool] = []
        text = ""  # since the last special token
        spans: list[tuple[int, int]] = []  # (start, end) of the answers in it
        after_answer = False

        def add(part: str, answers: bool) -> None:
            nonlocal text
            if answers:
                spans.append((len(text), len(text) + len(part)))
            text += part

        def flush() -> None:
            nonlocal text, spans
            encoding = (self.inside if ids else self.tokenizer.inner).encode(text, add_special_tokens=False)
            ids.extend(encoding.ids)
            learned.extend(any(start < to and end > begin for begin, to in spans) for start, end in encoding.offsets)
            text, spans = "", []

        for part, message in self._parts(messages, add_generation_prompt):
            if message is not None:
                after_answer = message["role"] == "assistant" and message.get("weight", 1) != 0
                add(part, after_answer)
                continue
            position = 0
            for match in self.special.finditer(part):
                between = part[position : match.start()]
                add(between, after_answer and not between.strip())
                flush()
                ids.append(self.ids[match[0]])
                learned.append(after_answer)
                after_answer, position = False, match.end()
            add(part[position:], False)
        flush()
        return np.array(ids, np.int64), np.array(learned, bool)

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        tokenizer = self.tokenizer
        named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad,
                 "unk_token": tokenizer.unk}
        known = {name: token for name, token in named.items() if token in tokenizer.vocab}
        try:
            return self.template.render(messages=messages, tools=None, documents=None, enable_thinking=False,
                                        add_generation_prompt=add_generation_prompt, **known)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BardletError(f"the model's chat template rejects the conversation ({one_line(error)})") from None

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Part]:
        """Return the parts of a rendered conversation: first and last, and between two messages, the template's own."""
        marked = [{"role": message["role"], "content": f"\ue000{n}\ue001"} for n, message in enumerate(messages)]
        pieces = MARK.split(self._render(marked, add_generation_prompt))  # own, number, own, number, ..., own
        if [int(number) for number in pieces[1::2]] != list(range(len(messages))):
            raise BardletError("the model's chat template leaves out or reorders messages")
        plain = [{"role": message["role"], "content": str(message["content"])} for message in messages]
        whole = self._render(plain, add_generation_prompt)
        parts = _aligned(whole, pieces[::2], messages) or self._rewritten(whole, pieces[::2], messages)
        if parts is None:
            raise BardletError("the model's chat template rewrites the messages; remove special tokens and the marks "
                               "of tool calls from their text")
        return parts

    def _rewritten(self, whole: str, own: Sequence[str], messages: Sequence[Message]) -> list[Part] | None:
        """Return the parts of a conversation whose messages the template rewrites, as it removes thoughts.

        Each message is what stands between the same two special tokens, without the template's own words there. None if
        a message has special tokens itself, which could be taken for those of the template.
        """
        if any(self.special.search(message["content"]) for message in messages):
            return None
        marked = "".join(f"{text}\ue000{n}\ue001" for n, text in enumerate(own[:-1])) + own[-1]
        special = self.special.findall(marked)
        if special != self.special.findall(whole):
            return None
        parts: list[Part] = [("", None)]
        models, texts = self.special.split(marked), self.special.split(whole)
        for model, text, token in zip(models, texts, [*special, ""], strict=True):
            before, *rest = MARK.split(model)
            if len(rest) > 2:
                return None
            start = _common(before, text)
            end = _common(rest[1][::-1], text[start:][::-1]) if rest else len(text) - start
            parts[-1] = parts[-1][0] + text[:start], None
            if rest:
                parts += [(text[start : len(text) - end], messages[int(rest[0])]), ("", None)]
            parts[-1] = parts[-1][0] + text[len(text) - end :] + token, None
        return parts

    def _find_ends(self) -> list[int]:
        """Return the ids that end an answer: the special token after it, and those that end a text."""
        answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        parts = self._parts(answer, False)
        used = set(self.special.findall("".join(text for text, message in parts if message is None)))
        for token in self.tokenizer.rules["added_tokens"]:
            if token["content"] in used and (token["lstrip"] or token["rstrip"] or token["single_word"]):
                raise BardletError(f"the special token {token['content']} of the model's chat template takes the white "
                                   "space around it, which bardlet does not support")
        first = self.special.search(parts[-1][0])
        return sorted({*self.tokenizer.stop_ids, *([self.ids[first[0]]] if first else [])})


def _after_special(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return the library's tokenizer for a text that follows a special token: some put a space before other texts."""
    if not start_only(tokenizer.rules):
        return tokenizer.inner
    rules = json.loads(tokenizer.inner.to_str())
    for step in start_only(rules):
        step["prepend_scheme"] = "never"
    return Tokenizer(json.dumps(rules)).inner


def _common(a: str, b: str) -> int:
    """Return the length of the longest common beginning of two strings."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _aligned(whole: str, own: Sequence[str], messages: Sequence[Message]) -> list[Part] | None:
    """Return the parts of a rendered conversation, with each message as it is, or without white space around it.

    own: the template's parts. None if the conversation does not consist of these parts and messages.
    """
    ends: list[dict[int, tuple[int, str]]] = [{len(own[0]): (0, "")}] if whole.startswith(own[0]) else [{}]
    for message, after in zip(messages, own[1:], strict=True):
        content = str(message["content"])
        reached: dict[int, tuple[int, str]] = {}
        for start in ends[-1]:
            for text in (content, content.strip(), content.rstrip(), content.lstrip()):
                if whole.startswith(text + after, start):
                    reached.setdefault(start + len(text) + len(after), (start, text))
        ends.append(reached)
    at = len(whole)
    if at not in ends[-1]:
        return None
    parts: list[Part] = [(own[-1], None)]
    for message, before, reached in zip(reversed(messages), own[-2::-1], ends[:0:-1], strict=True):
        at, text = reached[at]
        parts += [(text, message), (before, None)]
    return parts[::-1]


@lru_cache(maxsize=8)
def of(tokenizer: Tokenizer) -> ForeignTemplate:
    """Return the template of a tokenizer. BardletError if it cannot be used."""
    return ForeignTemplate(tokenizer)
