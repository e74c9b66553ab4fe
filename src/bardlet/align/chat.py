"""The one chat template: who says what, as tokens.

    <|user|>What is two and two?<|end|><|assistant|>Four.<|end|>

A special token for each role, the words, and `<|end|>`. What a person writes can never become one of these tokens: in
content `<|` is written `< |`, here and in the template that transformers reads, so that both give the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role is system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | replace('<|', '< |') + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The same in Jinja, which transformers runs in a sandbox: `chat_template` of tokenizer_config.json."""

Message = Mapping[str, Any]
"""`role`, one of ROLES, and `content`, a text."""


def encode(words: Tokenizer, messages: Sequence[Message], ask: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as tokens, and which of them the assistant wrote.

    Args:
        words: a tokenizer with the tokens of the template.
        messages: in their order.
        ask: let the assistant's next answer begin.

    Returns:
        (ids, answer): int64 and boolean, both (T,). answer is True for the words of the assistant's messages and the
        `<|end|>` behind each, which is what a model is to learn: never for what begins a message.

    Raises:
        BardletError: a tokenizer without these tokens; no message, or one that is none, and which.
    """
    marks = {name: special(words, name) for name in (*ROLES, "end")}
    ids: list[int] = []
    answer: list[bool] = []
    for role, content in _checked(messages):
        said = [*words.encode(without_marks(content)).tolist(), marks["end"]]
        ids += [marks[role], *said]
        answer += [False, *[role == "assistant"] * len(said)]
    if ask:
        ids.append(marks["assistant"])
        answer.append(False)
    return np.array(ids, dtype=np.int64), np.array(answer, dtype=bool)


def without_marks(content: str) -> str:
    """`content` with nothing in it that reads like a special token of the template."""
    return content.replace("<|", "< |")


def special(words: Tokenizer, name: str) -> int:
    """The id of the special token of a role, or of `end`. BardletError where the tokenizer has none."""
    token = words.vocab.get(f"<|{name}|>")
    if token is None or token not in words.special:
        raise BardletError(f"the model's tokenizer has no token <|{name}|>, so it cannot hold a conversation; "
                           "train the base with --tokenizer bpe")
    return token


def _checked(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """(role, content) of each message. BardletError for what is none."""
    if not len(messages):
        raise BardletError("a conversation without a message; give at least one")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BardletError(f"message {number}: its role is {role!r}; it must be system, user or assistant")
        content = message.get("content")
        if not isinstance(content, str):
            raise BardletError(f"message {number}: its content is no text")
        yield role, content
