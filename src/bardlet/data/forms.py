"""Read conversations, preferences and questions from the forms of records in use.

    conversation   `messages` (OpenAI: `role`, `content`) or `conversations` (ShareGPT: `from`, `value`)
    answer         a prompt (`prompt`, `question`, `query` or `instruction`) and its answer (`answer`, `completion`,
                   `response` or `output`); optionally with `input` or `context`, `system` and `history`
    preference     a prompt, `chosen` and `rejected`: strings, messages, or whole conversations with a common beginning
                   (UltraFeedback, Anthropic's hh-rlhf)

Each function takes a record's `Fields`, which remember what was read, and raises `Unusable` for a record that cannot be
used. This module knows nothing of files and tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bardlet.errors import printable

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""`role`, one of ROLES; `content`, a string; and `weight`, 0 for an assistant message that is not to be learned."""

ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
"""The role that each name stands for, in lower case."""
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation",
              "ipython"}  # fmt: skip

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "instruction")
ANSWERS = ("answer", "completion", "response", "output")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""The beginning of a turn in a string of Anthropic's hh-rlhf."""


class Unusable(Exception):
    """The reason why a record cannot be used, as "its answer is empty"."""


class Fields:
    """The fields of a record, by name in lower case; null counts as absent. A bare list is a list of messages."""

    def __init__(self, record: Mapping[str, Any] | list[Any]) -> None:
        fields = record if isinstance(record, Mapping) else {MESSAGES[0]: record}
        self.names = list(fields)
        self.values = {name.lower(): value for name, value in fields.items() if value is not None}
        self.unread = {name for name, value in self.values.items() if value and isinstance(value, str | list | dict)}
        """Fields with text that nothing has read."""
        self.has_turns = False
        """True if the prompt is a string with the turns of hh-rlhf."""

    def first(self, names: Sequence[str]) -> str | None:
        """Return the first of the names that the record has."""
        return next((name for name in names if name in self.values), None)

    def read(self, name: str) -> Any:
        """Return the value of a field that the record has."""
        self.unread.discard(name)
        return self.values[name]

    def string(self, names: Sequence[str]) -> str:
        """Return the first of the fields, a string; empty if the record has none."""
        name = self.first(names)
        if name is None:
            return ""
        value = self.read(name)
        if not isinstance(value, str):
            raise Unusable(f'its "{name}" is {kind(value)}, not a string')
        return value

    def names_in_words(self) -> str:
        """Return the first names, for a message."""
        return ", ".join(map(printable, self.names[:6])) or "nothing"


def kind(value: Any) -> str:
    """Return the type of a JSON value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


# ------------------------------------------------------------------------------------ conversations


def conversation(fields: Fields) -> list[Message]:
    """Return the messages of a conversation that has an answer to learn."""
    messages = dialogue(fields)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Unusable("has no answer: no assistant message")
    if not all(answer["content"].strip() for answer in answers):
        raise Unusable("its answer is empty" if len(answers) == 1 else "one of its answers is empty")
    if not any(answer.get("weight", 1) for answer in answers):
        raise Unusable("the weight of every answer is 0")
    return messages


def dialogue(fields: Fields) -> list[Message]:
    """Return the messages of a record, with or without an answer."""
    if name := fields.first(MESSAGES):
        return _with_system(as_messages(fields.read(name), "user", name, fields), fields)
    messages = prompt(fields)
    name = fields.first((*ANSWERS, "assistant"))
    answer = as_messages(fields.read(name), "assistant", name, fields) if name else []
    if answer and messages[-1]["role"] == "assistant":
        raise Unusable("its prompt ends with an assistant message, and an answer follows")
    return [*messages, *answer]


def prompt(fields: Fields) -> list[Message]:
    """Return system message, history and prompt of a record that has no list of messages."""
    name = fields.first(PROMPTS) or fields.first((*CONTEXTS, "user"))
    if name is None:
        raise Unusable("has no conversation: it needs messages, or a prompt and an answer, but has "
                       f"{fields.names_in_words()}")
    value = fields.read(name)
    messages = as_messages(value, "user", name, fields) if value or not isinstance(value, str) else []
    context = fields.string(CONTEXTS) if name not in CONTEXTS else ""
    if messages and messages[-1]["role"] == "assistant":
        raise Unusable(f'its "{name}" ends with an assistant message; end it with a user message')
    if context.strip():
        asked = messages[-1]["content"] if messages else ""
        messages = [*messages[:-1], {"role": "user", "content": "\n\n".join(filter(None, (asked, context)))}]
    if not any(message["content"].strip() for message in messages):
        raise Unusable("its prompt is empty")
    return _with_system([*_history(fields), *messages], fields)


def _with_system(messages: list[Message], fields: Fields) -> list[Message]:
    """Return messages after the system message of a field, if the record has one."""
    system = fields.string(SYSTEMS)
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _history(fields: Fields) -> list[Message]:
    """Return earlier messages: a list of messages, or of pairs of question and answer."""
    if "history" not in fields.values:
        return []
    turns = fields.read("history")
    if not isinstance(turns, list) or not all(isinstance(turn, list | dict) for turn in turns):
        raise Unusable('its "history" is not a list of messages, or of pairs of question and answer')
    if turns and isinstance(turns[0], dict):
        return as_messages(turns, "user", "history", fields)
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
               for turn in turns):
        raise Unusable('its "history" is not a list of pairs of question and answer')
    return [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES[1:], turn, strict=True)]


def as_messages(value: Any, role: str, name: str, fields: Fields) -> list[Message]:
    """Return a value as messages: a string of `role`, a string with turns of hh-rlhf, a message or a list of them.

    Args:
        name: the field's name, for messages.
        fields: receives the names of message fields that nothing reads.
    """
    if isinstance(value, str):
        messages = turns(value)
        fields.has_turns = fields.has_turns or bool(messages)
        return messages or [{"role": role, "content": value.strip() if fields.has_turns else value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise Unusable(f'its "{name}" is {kind(value)}, not a string or a list of messages')
    if not value:
        raise Unusable(f'its "{name}" is empty')
    return [_message(each, number, name, fields) for number, each in enumerate(value, 1)]


def _message(value: Any, number: int, name: str, fields: Fields) -> Message:
    """Return one message in bardlet's form."""
    where = f"message {number}"
    if not isinstance(value, Mapping):
        raise Unusable(f"{where} is {kind(value)}, not an object with role and content")
    given = value.get("role", value.get("from"))
    role = str(given).lower()
    if role in TOOL_ROLES or value.get("tool_calls") or value.get("function_call"):
        raise Unusable("calls a tool, for which there is no role")
    if role not in ROLE_NAMES:
        raise Unusable(f"{where}: its role is {printable(given)}, not system, user or assistant")
    key = next((key for key in ("content", "value", "text") if key in value), None)
    if key is None:
        raise Unusable(f"{where} has no content, only {', '.join(map(printable, list(value)[:5]))}")
    fields.unread |= {f"{name}: {other}" for other, text in value.items()
                      if isinstance(text, str | list | dict) and text and other not in ("role", "from", key)}
    message = {"role": ROLE_NAMES[role], "content": _content(value[key], where)}
    weight = value.get("weight", value.get("train"))
    if weight is None:
        return message
    if weight not in (0, 1):  # also false and true
        raise Unusable(f"{where}: its weight is {printable(weight)}, not 0 or 1")
    return {**message, "weight": int(weight)}


def _content(value: Any, where: str) -> str:
    """Return the content of a message: a string, or the text of its parts."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise Unusable(f"{where}: its content is {kind(value)}, not a string")
        return value
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            form = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise Unusable(f"{where}: a part of its content is {printable(form)}, not text")
        texts.append(part["text"])
    return "".join(texts)


def turns(text: str) -> list[Message]:
    """Return the turns of a string in the form of hh-rlhf, or none if it has another form.

    "\\n\\nHuman: Hi\\n\\nAssistant:" is one user message: the assistant has not answered yet.
    """
    marks = list(TURN.finditer(text))
    if len(marks) < 2 or text[: marks[0].start()].strip() or marks[0][1] != "Human":
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    messages: list[Message] = [
        {"role": "user" if mark[1] == "Human" else "assistant", "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


# ------------------------------------------------------------------------------------ preferences


@dataclass(frozen=True)
class Preference:
    """Two completions of the same prompt, the preferred one first."""

    prompt: list[Message]
    chosen: str
    rejected: str


def preference(fields: Fields) -> Preference:
    """Return the prompt of a record, and its chosen and rejected completion."""
    common, chosen, rejected = _completions(fields)
    messages = _prompt_of_pair(fields, common)
    if fields.has_turns:
        chosen, rejected = chosen.strip(), rejected.strip()
    if not any(message["content"].strip() for message in messages):
        raise Unusable("has no prompt before its completions")
    if messages[-1]["role"] == "assistant":
        raise Unusable("its prompt ends with an assistant message; end it with a user message")
    if not chosen.strip() or not rejected.strip():
        raise Unusable(f"its {'chosen' if not chosen.strip() else 'rejected'} completion is empty")
    if chosen == rejected:
        raise Unusable("its chosen and rejected completions are the same")
    return Preference(messages, chosen, rejected)


def _completions(fields: Fields) -> tuple[list[Message], str, str]:
    """Return (the messages with which both sides begin, the chosen completion, the rejected completion)."""
    names = next((pair for pair in PAIRS if fields.first(pair)), None)
    if names is None:
        name = fields.first(("output",))
        values = fields.read(name) if name else None
        if not isinstance(values, list) or len(values) != 2:
            raise Unusable(f"has no chosen and rejected completion, only {fields.names_in_words()}")
        names = ("output", "output")
    else:
        for name in names:
            if name not in fields.values:
                raise Unusable(f"has no {name} completion, only {fields.names_in_words()}")
        values = [fields.read(name) for name in names]
    sides = [as_messages(value, "assistant", name, fields) for name, value in zip(names, values, strict=True)]
    for name, side in zip(names, sides, strict=True):
        if side[-1]["role"] != "assistant":
            raise Unusable(f'its "{name}" ends with a {side[-1]["role"]} message; end it with an assistant message')
    common = max((side[:-1] for side in sides), key=len)
    if any(side[:-1] not in (common, []) for side in sides):  # a side may be the completion alone
        raise Unusable("its chosen and rejected conversations differ before their last messages")
    return common, sides[0][-1]["content"], sides[1][-1]["content"]


def _prompt_of_pair(fields: Fields, common: list[Message]) -> list[Message]:
    """Return the prompt of a preference: its own field, and the messages with which both completions begin."""
    if fields.first((*PROMPTS, *CONTEXTS, "user")):
        own = prompt(fields)
        fields.unread.difference_update(MESSAGES)  # UltraFeedback repeats the chosen conversation there
    elif name := fields.first(MESSAGES):
        own = _with_system(as_messages(fields.read(name), "user", name, fields), fields)
    else:
        return _with_system(common, fields) if common else []
    asked = [message["content"].strip() for message in own if message["role"] == "user"]
    if not common:
        return own
    if not any(message["role"] == "user" for message in common):
        return [*common, *own] if common[-1]["role"] == "system" else [*own, *common]
    if asked and asked[0] not in {message["content"].strip() for message in common}:
        raise Unusable("its prompt is not part of its chosen and rejected conversations")
    return _with_system(common, fields)


# ------------------------------------------------------------------------------------ questions


@dataclass(frozen=True)
class Question:
    """A prompt, and its reference answer if the data has one."""

    prompt: list[Message]
    answer: str | None


def question(fields: Fields) -> Question:
    """Return the last question of a conversation or a preference, with its answer."""
    if any(fields.first(pair) for pair in PAIRS):
        pair = preference(fields)
        return Question(pair.prompt, pair.chosen)
    messages = dialogue(fields)
    last = messages[-1] if messages[-1]["role"] == "assistant" else None
    asked = messages[:-1] if last else messages
    if not any(message["content"].strip() for message in asked):
        raise Unusable("has an answer without a prompt")
    return Question(asked, last["content"] if last else None)
