"""Where conversations and preferences come from: records of JSON, one a line or a list of them, plain or compressed.

A conversation has `messages`, each with `role` and `content`; or, as Stanford's Alpaca has them, `instruction`, perhaps
`input`, and `output`, which make one question and its answer (and perhaps, as LLaMA-Factory has them, `system` and
`history`, pairs of question and answer before it); or `prompt` (in GSM8K `question`) and `answer`. A preference has
`prompt`, and of two answers to it the `chosen` and the `rejected` one. Nothing here knows a token.
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

from bardlet.data.corpus import MAX_FILES_LISTED
from bardlet.data.text import Source, digest_of, inner_suffix, read_text
from bardlet.errors import BardletError, printable

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
        """(training, held-out) conversations; as `preferences` holds some out: the same questions in all stages.

        Raises:
            BardletError: a record that is none, and where; or too few of them.
        """
        found = [conversation(record, place) for file in self.files for place, record in records(file)]
        asked = [one[:-1] if one[-1]["role"] == "assistant" else one for one in found]
        return self._by_prompt(found, [as_text(one) for one in asked], "conversations")

    def preferences(self) -> tuple[list[Preference], list[Preference]]:
        """(training, held-out) preferences: those of every tenth prompt are held out, all that a prompt has together.

        Where nearly all have the same few prompts, every tenth pair is held out, and a notice says so.

        Raises:
            BardletError: a record that is none, and where; or too few of them.
        """
        found = [preference(record, place) for file in self.files for place, record in records(file)]
        return self._by_prompt(found, [as_text(one.prompt) for one in found], "preferences")

    def questions(self) -> tuple[list[Question], list[Question]]:
        """(training, held-out) questions, of conversations and of preferences; as `preferences` holds some out.

        Raises:
            BardletError: a record that is none, and where; or too few of them.
        """
        found = [question(record, place) for file in self.files for place, record in records(file)]
        return self._by_prompt(found, [as_text(one.prompt) for one in found], "questions")

    def _by_prompt(self, found: list[T], prompts: list[str], what: str) -> tuple[list[T], list[T]]:
        """The records of which every tenth prompt is held out, and these; where prompts are few, every tenth record."""
        if len(found) < MAX_FILES_LISTED:
            raise BardletError(f"{self.name}: {len(found)} {what} are too few to train on and to hold some out: "
                               f"give {MAX_FILES_LISTED} or more")
        known: dict[str, int] = {}
        numbers = [known.setdefault(prompt, len(known)) for prompt in prompts]
        if len(known) < MAX_FILES_LISTED:
            log.warning("%s: of %d different questions none can be spared, so every tenth of the %s is held out, whose "
                        "question may be among those that are learned from, too", self.name, len(known), what)
            numbers = list(range(len(found)))
        return ([one for one, number in zip(found, numbers, strict=True) if number % 10 != 9],
                [one for one, number in zip(found, numbers, strict=True) if number % 10 == 9])


@dataclass(frozen=True)
class Preference:
    """Two answers to the same messages, of which somebody preferred the first."""

    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Question:
    """Messages that want an answer, and the answer that the data have to it, if they have one."""

    prompt: list[Message]
    answer: str | None


def as_text(messages: Sequence[Message]) -> str:
    """Who says what, as a key: what else a message has, a model never sees."""
    return json.dumps([(one["role"], one["content"]) for one in messages])


T = TypeVar("T")


def find(text: Sequence[str], wanted: str = "conversations") -> Examples:
    """The records in these files. BardletError for a file that is not there, or for none; wanted: what they hold."""
    files = tuple(map(Path, text))
    if not files:
        raise BardletError(f"there is nothing to learn from: name a file of {wanted}")
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
    if _asks(record) and "answer" in record:
        if not isinstance(record["answer"], str):
            raise BardletError(f'{place}: "answer" is {_kind(record["answer"])}, not a text')
        return [*_asked(record, place), {"role": "assistant", "content": record["answer"]}]
    if "instruction" not in record or "output" not in record:
        raise BardletError(f"{place}: has neither messages, nor instruction and output, nor prompt and answer, but "
                           f"{', '.join(map(printable, list(record)[:5])) or 'nothing'}; see `bardlet sft --help`")
    parts = {name: record[name] for name in ("instruction", "output")}
    parts |= {name: record[name] for name in ("input", "system") if record.get(name) is not None}
    turns = record.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BardletError(f'{place}: "history" is no list of pairs, a question and its answer each')
    for name, text in [*parts.items(), *(("history", text) for turn in turns for text in turn)]:
        if not isinstance(text, str):
            raise BardletError(f'{place}: "{name}" is {_kind(text)}, not a text')
    question = "\n\n".join(filter(None, (parts["instruction"], parts.get("input"))))
    said = [("system", parts.get("system")), *(both for turn in turns for both in zip(ROLES[1:], turn, strict=True)),
            ("user", question), ("assistant", parts["output"])]  # fmt: skip
    return [{"role": role, "content": text} for role, text in said if text or role != "system"]


def _asks(record: Mapping[str, Any]) -> str | None:
    """The name under which a record has a question alone."""
    return next((name for name in ("prompt", "question") if name in record), None)


def _asked(record: Mapping[str, Any], place: str) -> list[Message]:
    """The question that a record has under a name of its own, as messages."""
    name = str(_asks(record))
    return _messages(record[name], "user", f'{place}: "{name}"')


def preference(record: Mapping[str, Any], place: str) -> Preference:
    """The two answers of a record; both, and the prompt, are texts or messages.

    Raises:
        BardletError: for one that is no preference, with its place.
    """
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in record]
    if missing:
        raise BardletError(f"{place}: has no {missing[0]}, but {', '.join(map(printable, list(record)[:5])) or 'nothing'}; "
                           "a preference has prompt, chosen and rejected")
    prompt = _messages(record["prompt"], "user", f'{place}: "prompt"')
    answers = [_messages(record[name], "assistant", f'{place}: "{name}"')[-1] for name in ("chosen", "rejected")]
    if prompt[-1]["role"] == "assistant":
        raise BardletError(f'{place}: "prompt" ends with an answer; it must end where one is due')
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer["role"] != "assistant":
            raise BardletError(f'{place}: "{name}" ends with a message of the {answer["role"]}, not with an answer')
    return Preference(prompt, *(answer["content"] for answer in answers))


def question(record: Mapping[str, Any], place: str) -> Question:
    """What a conversation or a preference asks last. BardletError for a record that asks nothing, with its place."""
    if "chosen" in record:
        one = preference(record, place)
        return Question(one.prompt, one.chosen)
    silent = _asks(record) is not None and record.get("answer") is None
    messages = _asked(record, place) if silent else list(conversation(record, place))
    last = messages.pop() if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise BardletError(f"{place}: an answer without a question; write the question before it")
    return Question(messages, last["content"] if last else None)


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """A text as one message, or the messages that it is already."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BardletError(f"{where} is {_kind(value)}, neither a text nor messages")
    try:
        return list(check(value))
    except BardletError as error:
        raise BardletError(f"{where}: {error}") from None


def check(messages: Sequence[Any]) -> Sequence[Message]:
    """`messages`, if they are a conversation. BardletError for one that is none, and which."""
    if not messages:
        raise BardletError("a conversation without a message; give at least one")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BardletError(f"message {number}: its role is {printable(role)}; it must be system, user or assistant")
        if "content" not in message:
            raise BardletError(f"message {number}: has no content, but {', '.join(map(printable, list(message)[:5]))}")
        if not isinstance(message.get("content"), str):
            raise BardletError(f"message {number}: its content is {_kind(message.get('content'))}, not a text")
    return messages
