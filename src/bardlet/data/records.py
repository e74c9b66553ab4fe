"""Conversations, preferences and questions from files, split into training and held-out ones.

data/rows.py reads the rows of a file, data/forms.py the forms that a row may have. A row that cannot be used is left
out and counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bardlet.data import forms
from bardlet.data.forms import ROLES, Fields, Message, Preference, Question, Unusable
from bardlet.data.rows import Row, rows
from bardlet.data.text import MIN_TO_SPLIT, OPENERS, Source, digest_of
from bardlet.errors import BardletError, printable

log = logging.getLogger("bardlet")

T = TypeVar("T")

MAX_BAD = 0.05
"""Share of rows that may be unusable, by default."""
REPORT = "report.json"
"""The file of a folder of tokens that has the report of its records."""
NAMED_ROWS = 3
"""Rows that a message names for each reason."""


@dataclass
class Report:
    """Records that were left out of files: notes in words, and counts.

    total: rows read. unusable: rows left out. first: location and reason of the first of them.
    """

    notes: list[str] = field(default_factory=list)
    total: int = 0
    unusable: int = 0
    first: str = ""

    def announce(self, max_bad: float) -> None:
        """Log the notes. BardletError if more than the share `max_bad` of the rows is unusable."""
        if self.unusable and self.unusable == self.total:
            others = f"; none of the {self.total:,} records can be used" * (self.total > 1)
            raise BardletError(f"{self.first}{others}")
        if self.unusable > max_bad * self.total:
            raise BardletError(f"{self.first}; {self.unusable:,} of {self.total:,} records cannot be used, more than "
                               f"--max-bad {max_bad:g} allows")
        for note in self.notes:
            log.warning(note)

    def save(self, folder: Path) -> str:
        """Write the report into a folder of tokens and return the file's name."""
        (folder / REPORT).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return REPORT

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Return the report in a folder of tokens."""
        return cls(**json.loads((folder / REPORT).read_text(encoding="utf-8")))


@dataclass
class Examples:
    """Records from files, in order. One in ten is held out. max_bad: the share of records that may be unusable."""

    name: str
    files: tuple[Path, ...]
    max_bad: float = MAX_BAD
    report: Report = field(default_factory=Report)
    """Records that the last reading left out."""

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the bytes of the files, whatever their paths and names."""
        return hashlib.sha256(b"".join(map(digest_of, self.files))).hexdigest()

    def conversations(self) -> tuple[list[list[Message]], list[list[Message]]]:
        """Return (training, held-out) conversations, split as in `preferences`: by the same prompts in all stages.

        Raises:
            BardletError: too many unusable records, or too few usable ones.
        """
        examples = self.read(forms.conversation)
        prompts = [messages[:-1] if messages[-1]["role"] == "assistant" else messages for messages in examples]
        return self.by_prompt(examples, prompts, "conversations")

    def preferences(self) -> tuple[list[Preference], list[Preference]]:
        """Return (training, held-out) preferences: every tenth prompt is held out, with all its preferences.

        If nearly all records share a few prompts, every tenth record is held out instead, with a warning.

        Raises:
            BardletError: too many unusable records, or too few usable ones.
        """
        examples = self.read(forms.preference)
        return self.by_prompt(examples, [example.prompt for example in examples], "preferences")

    def questions(self) -> tuple[list[Question], list[Question]]:
        """Return (training, held-out) questions of conversations and preferences, split as in `preferences`.

        Raises:
            BardletError: too many unusable records, or too few usable ones.
        """
        examples = self.read(forms.question)
        return self.by_prompt(examples, [example.prompt for example in examples], "questions")

    def read(self, convert: Callable[[Fields], T]) -> list[T]:
        """Return all usable records, converted; the `report` says what was left out, and is for the caller to announce.

        Raises:
            BardletError: no record is usable.
        """
        self.report = Report()
        examples = [example for file in self.files for example in self._read_file(file, convert)]
        if not examples:
            self.report.announce(max_bad=1)
        return examples

    def _read_file(self, file: Path, convert: Callable[[Fields], T]) -> list[T]:
        examples: list[T] = []
        reasons: dict[str, list[str]] = {}
        unread: dict[str, int] = {}
        report, before = self.report, self.report.total
        for location, value in rows_of(file):
            report.total += 1
            try:
                if isinstance(value, Unusable):
                    raise value
                if not isinstance(value, dict | list):
                    raise Unusable(f'is {forms.kind(value)}, not an object; write one like '
                                   '{"messages": [{"role": "user", "content": "..."}, ...]}')
                fields = Fields(value)
                examples.append(convert(fields))
                for name in fields.unread:
                    unread[name] = unread.get(name, 0) + 1
            except Unusable as reason:
                report.unusable += 1
                report.first = report.first or f"{location}: {reason}"
                reasons.setdefault(str(reason), []).append(location.removeprefix(f"{file}, "))
        if reasons:
            count = sum(map(len, reasons.values()))
            report.notes.append(f"{file}: left out {count:,} of {report.total - before:,} records: "
                                + "; ".join(_named(reason, where) for reason, where in _most_common(reasons)))
        if unread:
            names = ", ".join(f'"{name}"' for name in sorted(unread))
            report.notes.append(f"{file}: bardlet does not read the field{'s' * (len(unread) > 1)} {names}")
        return examples

    def by_prompt(self, examples: list[T], prompts: Sequence[list[Message]], kind: str) -> tuple[list[T], list[T]]:
        """Hold out the records of every tenth prompt or, if prompts are few, every tenth record."""
        if len(examples) < MIN_TO_SPLIT:
            noun = f"{kind[:-1]} is" if len(examples) == 1 else f"{kind} are"
            unusable = f" ({self.report.unusable:,} unusable; {self.report.first})" if self.report.unusable else ""
            raise BardletError(f"{self.name}: {len(examples)} {noun} too few to hold some out for validation"
                               f"{unusable}; provide at least {MIN_TO_SPLIT}")
        known: dict[str, int] = {}
        numbers = [known.setdefault(as_text(prompt), len(known)) for prompt in prompts]
        if len(known) < MIN_TO_SPLIT:
            log.warning("%s: too few different prompts (%d) to hold some out; holding out every tenth of the %s, "
                        "so that the same prompts are in both splits", self.name, len(known), kind)
            numbers = self.number_records(examples)
        held = [number % 10 == 9 for number in numbers]
        self._note_shared_questions(prompts, held)
        return ([example for example, out in zip(examples, held, strict=True) if not out],
                [example for example, out in zip(examples, held, strict=True) if out])

    def number_records(self, examples: Sequence[Any]) -> list[int]:
        """Return numbers for `by_prompt` if prompts are few; those that end in 9 are held out."""
        return list(range(len(examples)))

    def _note_shared_questions(self, prompts: Sequence[list[Message]], held: Sequence[bool]) -> None:
        """Log how many held-out prompts begin with a question that is also in the training split."""
        asked = [next((message["content"] for message in prompt if message["role"] == "user"), "")
                 for prompt in prompts]
        train = {text for text, out in zip(asked, held, strict=True) if not out}
        shared = sum(text in train for text, out in zip(asked, held, strict=True) if out)
        if shared:
            log.warning("%s: the first question of %d of the %d held-out records is also in the training split",
                        self.name, shared, sum(held))


def _most_common(reasons: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    return sorted(reasons.items(), key=lambda item: -len(item[1]))[:NAMED_ROWS]


def _named(reason: str, locations: Sequence[str]) -> str:
    """Return a reason with its first locations, as "line 5 and 3 more: its answer is empty"."""
    more = len(locations) - NAMED_ROWS
    return f"{', '.join(locations[:NAMED_ROWS])}{f' and {more:,} more' if more > 0 else ''}: {reason}"


def as_text(messages: Sequence[Message]) -> str:
    """Return roles and contents as a key; the model never sees other fields of a message."""
    return json.dumps([(message["role"], message["content"]) for message in messages])


def find(text: Sequence[str], expected: str = "conversations", max_bad: float = MAX_BAD,
         examples_class: type[Examples] = Examples) -> Examples:
    """Return the records of these files. BardletError for a missing file, or for no file; expected: their content."""
    files = tuple(map(Path, text))
    if not files:
        raise BardletError(f"no training data; name a file of {expected}")
    for file in files:
        if not file.exists() or file.is_dir():
            raise BardletError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}; "
                               f"name a file of {expected}")
    first = files[0].name
    for suffix in (*OPENERS, ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        first = first.removesuffix(suffix)
    return examples_class(first if len(files) == 1 else f"{first}-and-{len(files) - 1}", files, max_bad)


def rows_of(file: Path) -> Iterator[Row]:
    """Yield the rows of a file; notices about its encoding are logged."""
    return rows(Source(file, file.name), lambda source, notice: log.warning("%s: %s", source.path, notice))


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
            raise BardletError(f"message {number}: its content is {forms.kind(message.get('content'))}, not a string")
    return messages
