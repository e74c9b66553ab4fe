"""Conversations and preferences from JSON records: one per line or a list of them, plain or compressed.

A conversation has one of:
  - `messages`, each with `role` and `content`;
  - `instruction`, optionally `input`, and `output` (Stanford's Alpaca), one question and its answer; optionally with
    `system` and `history`, earlier pairs of question and answer (LLaMA-Factory);
  - `prompt` (in GSM8K `question`) and `answer`.
A preference has `prompt`, and two completions of it, `chosen` and `rejected`. This module knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bardlet.data.corpus import MIN_TO_SPLIT
from bardlet.data.text import Source, digest_of, inner_suffix, read_text
from bardlet.errors import BardletError, printable

log = logging.getLogger("bardlet")

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""`role`, one of ROLES, and `content`, a string."""


@dataclass(frozen=True)
class Examples:
    """Records from files, in order. One in ten is held out."""

    name: str
    files: tuple[Path, ...]

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the bytes of the files, whatever their paths and names."""
        return hashlib.sha256(b"".join(map(digest_of, self.files))).hexdigest()

    def conversations(self) -> tuple[list[Sequence[Message]], list[Sequence[Message]]]:
        """Return (training, held-out) conversations, split as in `preferences`: by the same prompts in all stages.

        Raises:
            BardletError: an invalid record, with its location, or too few of them.
        """
        examples = [conversation(record, location) for file in self.files for location, record in records(file)]
        prompts = [messages[:-1] if messages[-1]["role"] == "assistant" else messages for messages in examples]
        return self._by_prompt(examples, [as_text(prompt) for prompt in prompts], "conversations")

    def preferences(self) -> tuple[list[Preference], list[Preference]]:
        """Return (training, held-out) preferences: every tenth prompt is held out, with all its preferences.

        If nearly all records share a few prompts, every tenth record is held out instead, with a warning.

        Raises:
            BardletError: an invalid record, with its location, or too few of them.
        """
        examples = [preference(record, location) for file in self.files for location, record in records(file)]
        return self._by_prompt(examples, [as_text(example.prompt) for example in examples], "preferences")

    def questions(self) -> tuple[list[Question], list[Question]]:
        """Return (training, held-out) questions of conversations and preferences, split as in `preferences`.

        Raises:
            BardletError: an invalid record, with its location, or too few of them.
        """
        examples = [question(record, location) for file in self.files for location, record in records(file)]
        return self._by_prompt(examples, [as_text(example.prompt) for example in examples], "questions")

    def _by_prompt(self, examples: list[T], prompts: list[str], kind: str) -> tuple[list[T], list[T]]:
        """Hold out the records of every tenth prompt or, if prompts are few, every tenth record."""
        if len(examples) < MIN_TO_SPLIT:
            noun = f"{kind[:-1]} is" if len(examples) == 1 else f"{kind} are"
            raise BardletError(f"{self.name}: {len(examples)} {noun} too few to hold some out for validation; "
                               f"provide at least {MIN_TO_SPLIT}")
        known: dict[str, int] = {}
        numbers = [known.setdefault(prompt, len(known)) for prompt in prompts]
        if len(known) < MIN_TO_SPLIT:
            log.warning("%s: too few different prompts (%d) to hold some out; holding out every tenth of the %s, "
                        "whose prompts may also be in the training split", self.name, len(known), kind)
            numbers = self.number_records(examples)
        return ([example for example, number in zip(examples, numbers, strict=True) if number % 10 != 9],
                [example for example, number in zip(examples, numbers, strict=True) if number % 10 == 9])

    def number_records(self, examples: Sequence[Any]) -> list[int]:
        """Return numbers for `_by_prompt` if prompts are few; those that end in 9 are held out."""
        return list(range(len(examples)))


@dataclass(frozen=True)
class Preference:
    """Two completions of the same prompt, the preferred one first."""

    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Question:
    """A prompt, and its reference answer if the data has one."""

    prompt: list[Message]
    answer: str | None


def as_text(messages: Sequence[Message]) -> str:
    """Return roles and contents as a key; the model never sees other fields of a message."""
    return json.dumps([(message["role"], message["content"]) for message in messages])


T = TypeVar("T")


def find(text: Sequence[str], expected: str = "conversations") -> Examples:
    """Return the records of these files. BardletError for a missing file, or for no file; expected: their content."""
    files = tuple(map(Path, text))
    if not files:
        raise BardletError(f"no training data; name a file of {expected}")
    for file in files:
        if not file.exists() or file.is_dir():
            raise BardletError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}; "
                               f"name a file of {expected}")
    first = files[0].name
    for suffix in (".gz", ".xz", ".json", ".jsonl"):
        first = first.removesuffix(suffix)
    return Examples(first if len(files) == 1 else f"{first}-and-{len(files) - 1}", files)


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, record) of each record of a .jsonl file, or of the list in a .json file, for messages.

    Raises:
        BardletError: invalid JSON or a value that is not an object, by file and line or record number.
    """
    source = Source(file, file.name)
    [(_, text)] = read_text(source, lambda source, notice: log.warning("%s: %s", source.path, notice))
    if inner_suffix(file) == ".json":
        values = _parsed(text, str(file), "save it as JSON, a list of objects")
        if not isinstance(values, list):
            raise BardletError(f"{file}: is {_kind(values)}, not a list of objects; if it has one object per line, "
                               "rename it to .jsonl")
        locations = ((f"{file}, record {number}", value) for number, value in enumerate(values, 1))
    else:
        locations = ((location := f"{file}, line {number}", _parsed(line, location, "write one object per line"))
                  for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for location, value in locations:
        if not isinstance(value, dict):
            raise BardletError(f"{location}: is {_kind(value)}, not an object; write one like "
                               '{"messages": [{"role": "user", "content": "..."}, ...]}')
        yield location, value


def _parsed(text: str, location: str, remedy: str) -> Any:
    try:
        value = json.loads(text)
        text.encode() if "\\u" not in text else json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BardletError(f"{location}: has half of a surrogate pair in it; write the character as UTF-8") from None
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BardletError(f"{location}: is not JSON{where}; {remedy}") from None
    return value


def _kind(value: Any) -> str:
    """Return the type of a JSON value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def conversation(record: Mapping[str, Any], location: str) -> Sequence[Message]:
    """Return the messages of a record. BardletError, with its location, if it is not a conversation."""
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list):
            raise BardletError(f'{location}: "messages" is {_kind(messages)}, not a list of messages')
        try:
            return check(messages)
        except BardletError as error:
            raise BardletError(f"{location}: {error}") from None
    if _prompt_field(record) and "answer" in record:
        if not isinstance(record["answer"], str):
            raise BardletError(f'{location}: "answer" is {_kind(record["answer"])}, not a string')
        return [*_prompt_messages(record, location), {"role": "assistant", "content": record["answer"]}]
    if "instruction" not in record or "output" not in record:
        raise BardletError(f"{location}: needs messages, or instruction and output, or prompt and answer, but has "
                           f"{', '.join(map(printable, list(record)[:5])) or 'nothing'}; see `bardlet sft --help`")
    parts = {name: record[name] for name in ("instruction", "output")}
    parts |= {name: record[name] for name in ("input", "system") if record.get(name) is not None}
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BardletError(f'{location}: "history" is not a list of pairs of question and answer')
    for name, text in [*parts.items(), *(("history", text) for turn in turns for text in turn)]:
        if not isinstance(text, str):
            raise BardletError(f'{location}: "{name}" is {_kind(text)}, not a string')
    question = "\n\n".join(filter(None, (parts["instruction"], parts.get("input"))))
    messages = [("system", parts.get("system")),
                *(both for turn in turns for both in zip(ROLES[1:], turn, strict=True)),
                ("user", question), ("assistant", parts["output"])]  # fmt: skip
    return [{"role": role, "content": text} for role, text in messages if text or role != "system"]


def _prompt_field(record: Mapping[str, Any]) -> str | None:
    """Return the name of the field that has the prompt alone, or None."""
    return next((name for name in ("prompt", "question") if name in record), None)


def _prompt_messages(record: Mapping[str, Any], location: str) -> list[Message]:
    """Return the prompt field of a record as messages."""
    name = str(_prompt_field(record))
    return as_messages(record[name], "user", f'{location}: "{name}"')


def preference(record: Mapping[str, Any], location: str) -> Preference:
    """Return the preference of a record, whose prompt and completions are strings or lists of messages.

    Raises:
        BardletError: with its location, if the record is not a preference.
    """
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in record]
    if missing:
        raise BardletError(f"{location}: has no {missing[0]}, only "
                           f"{', '.join(map(printable, list(record)[:5])) or 'nothing'}; "
                           "a preference needs prompt, chosen and rejected")
    prompt = as_messages(record["prompt"], "user", f'{location}: "prompt"')
    completions = [as_messages(record[name], "assistant", f'{location}: "{name}"')[-1]
                   for name in ("chosen", "rejected")]
    if prompt[-1]["role"] == "assistant":
        raise BardletError(f'{location}: "prompt" ends with an assistant message; end it with a user message')
    for name, completion in zip(("chosen", "rejected"), completions, strict=True):
        if completion["role"] != "assistant":
            raise BardletError(f'{location}: "{name}" ends with a {completion["role"]} message; end it with an '
                               "assistant message")
    return Preference(prompt, *(completion["content"] for completion in completions))


def question(record: Mapping[str, Any], location: str) -> Question:
    """Return the last question of a conversation or a preference. BardletError, with its location, if there is none."""
    if "chosen" in record:
        pair = preference(record, location)
        return Question(pair.prompt, pair.chosen)
    unanswered = _prompt_field(record) is not None and record.get("answer") is None
    messages = _prompt_messages(record, location) if unanswered else list(conversation(record, location))
    last = messages.pop() if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise BardletError(f"{location}: has an answer without a prompt; put the user message before it")
    return Question(messages, last["content"] if last else None)


def as_messages(value: Any, role: str, where: str) -> list[Message]:
    """Return a string as one message, and a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BardletError(f"{where} is {_kind(value)}, not a string or a list of messages")
    try:
        return list(check(value))
    except BardletError as error:
        raise BardletError(f"{where}: {error}") from None


def check(messages: Sequence[Any]) -> Sequence[Message]:
    """Return `messages` if they are a conversation. BardletError names the first message that is not valid."""
    if not messages:
        raise BardletError("the conversation has no messages; add at least one")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BardletError(f"message {number}: its role is {printable(role)}, not system, user or assistant")
        if "content" not in message:
            raise BardletError(f"message {number}: has no content, only {', '.join(map(printable, list(message)[:5]))}")
        if not isinstance(message.get("content"), str):
            raise BardletError(f"message {number}: its content is {_kind(message.get('content'))}, not a string")
    return messages
