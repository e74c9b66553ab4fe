"""Where conversations come from: records of JSON, one a line or a list of them, plain or compressed.

A record has `messages`, each with `role` and `content`; or, as Stanford's Alpaca has them, `instruction`, perhaps
`input`, and `output`, which make one question and its answer. Nothing here knows a token.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bardlet.config import TrainConfig
from bardlet.corpus import MANY
from bardlet.errors import BardletError, shown
from bardlet.reading import Source, digest_of, inner_suffix, read_text

log = logging.getLogger("bardlet")

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""`role`, one of ROLES, and `content`, a text."""


@dataclass(frozen=True)
class Examples:
    """Records from files, in their order. Of every ten one is held out."""

    name: str
    files: tuple[Path, ...]

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over the bytes of the files; not over where they lie, or what they are called."""
        return hashlib.sha256(b"".join(map(digest_of, self.files))).hexdigest()

    def conversations(self) -> tuple[list[Sequence[Message]], list[Sequence[Message]]]:
        """(training, held-out) conversations: every tenth is held out.

        Raises:
            BardletError: a record that is none, and where; or too few of them.
        """
        found = [conversation(record, place) for file in self.files for place, record in records(file)]
        if len(found) < MANY:
            raise BardletError(f"{self.name}: {len(found)} conversations are too few to train on and to hold some out: "
                               f"give {MANY} or more")
        held = found[9::10]
        del found[9::10]
        return found, held


def find(config: TrainConfig) -> Examples:
    """The records that the settings name. BardletError for a file that is not there."""
    files = tuple(map(Path, config.text))
    if not files:
        raise BardletError("there is nothing to learn from: name a file of conversations behind the base, .jsonl or "
                           ".json, with `messages`, or `instruction` and `output`")
    for file in files:
        if not file.exists() or file.is_dir():
            raise BardletError(f"{file}: {'is a folder' if file.is_dir() else 'there is no such file'}; "
                               "name a .jsonl or .json file of conversations")
    first = files[0].name
    for suffix in (".gz", ".xz", ".json", ".jsonl"):
        first = first.removesuffix(suffix)
    return Examples(first if len(files) == 1 else f"{first}-and-{len(files) - 1}", files)


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each record of a .jsonl file, or of the list in a .json file; the place is for people.

    Raises:
        BardletError: what is no JSON, or no object, with file and line or number.
    """
    source = Source(file, file.name)
    [(_, text)] = read_text(source, lambda source, what: log.warning("%s: %s", source.path, what))
    if inner_suffix(file) == ".json":
        values = _parsed(text, str(file), "save it as JSON, a list of objects")
        if not isinstance(values, list):
            raise BardletError(f"{file}: is {_kind(values)}, not a list of objects; rename it to .jsonl if it has one "
                               "a line")
        places = ((f"{file}, record {number}", value) for number, value in enumerate(values, 1))
    else:
        places = ((place := f"{file}, line {number}", _parsed(line, place, "write one object a line"))
                  for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for place, value in places:
        if not isinstance(value, dict):
            raise BardletError(f"{place}: is {_kind(value)}, not an object; write one like "
                               '{"messages": [{"role": "user", "content": "..."}, ...]}')
        yield place, value


def _parsed(text: str, place: str, remedy: str) -> Any:
    try:
        value = json.loads(text)
        text.encode() if "\\u" not in text else json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BardletError(f"{place}: has half of a surrogate pair in it: write it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BardletError(f"{place}: is not JSON{where}: {remedy}") from None
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def conversation(record: Mapping[str, Any], place: str) -> Sequence[Message]:
    """The messages of a record. BardletError for one that is no conversation, with its place."""
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list):
            raise BardletError(f'{place}: "messages" is {_kind(messages)}, not a list of messages')
        try:
            return check(messages)
        except BardletError as error:
            raise BardletError(f"{place}: {error}") from None
    if "instruction" not in record or "output" not in record:
        raise BardletError(f"{place}: has neither messages nor instruction and output, but "
                           f"{', '.join(map(shown, list(record)[:5])) or 'nothing'}; see `bardlet sft --help`")
    parts = {name: record.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in parts.items():
        if not isinstance(text, str):
            raise BardletError(f'{place}: "{name}" is {_kind(text)}, not a text')
    question = "\n\n".join(filter(None, (parts["instruction"], parts["input"])))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]


def check(messages: Sequence[Any]) -> Sequence[Message]:
    """`messages`, if they are a conversation. BardletError for one that is none, and which."""
    if not messages:
        raise BardletError("a conversation without a message; give at least one")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BardletError(f"message {number}: its role is {shown(role)}; it must be system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise BardletError(f"message {number}: its content is {_kind(message.get('content'))}, not a text")
    return messages
