"""The chat template: conversations as tokens.

    <|user|>What is two and two?<|end|><|assistant|>Four.<|end|>

Each message is the special token of its role, its content, and `<|end|>`. Content can never become a special token:
`<|` in it is written `< |`, both here and in the template that transformers reads, so both give the same ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from bardlet.data.forms import ROLES, Message
from bardlet.data.records import check
from bardlet.errors import BardletError
from bardlet.tokenizer import END, PAD, SEPARATOR, Tokenizer

if TYPE_CHECKING:
    from bardlet.data.foreign_template import ForeignTemplate

log = logging.getLogger("bardlet")

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role is system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | replace('<|', '< |') + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The same in Jinja: `chat_template` of tokenizer_config.json, which transformers runs in a sandbox."""


SPECIAL = (*(f"<|{role}|>" for role in ROLES), END)
"""The special tokens of the template."""


def is_missing(tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer lacks a special token of the template."""
    return not {SEPARATOR, PAD, *SPECIAL} <= set(tokenizer.special.values())


def with_special_tokens(tokenizer: Tokenizer, texts: Iterable[str] = ()) -> Tokenizer:
    """Return a tokenizer with the template's special tokens and, if it is of characters, with those of the texts.

    Raises:
        BardletError: text could become a special token (see `special_id`).
    """
    _check_safety(tokenizer)
    characters = set().union(*texts) if tokenizer.kind == "char" else ()
    return tokenizer.with_tokens((SEPARATOR, PAD, *SPECIAL), characters)


def is_foreign(tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer has a chat template of its own, other than bardlet's."""
    return tokenizer.chat_template not in (None, TEMPLATE)


def is_own(tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer has bardlet's chat template and its tokens."""
    return tokenizer.chat_template == TEMPLATE and not is_missing(tokenizer)


def _foreign(tokenizer: Tokenizer) -> ForeignTemplate:
    from bardlet.data import foreign_template  # Jinja is imported for the models that need it

    return foreign_template.of(tokenizer)


def reason_against(tokenizer: Tokenizer) -> str | None:
    """Return why a tokenizer's chat template cannot be used, as a sentence; None if it can."""
    if tokenizer.chat_template is None:
        return "it has no chat template"
    try:
        _foreign(tokenizer) if is_foreign(tokenizer) else special_tokens(tokenizer)
    except BardletError as error:
        return str(error)
    return None


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer. Raises as `encode` does."""
    if is_foreign(tokenizer):
        return _foreign(tokenizer).end_ids
    return sorted({special_id(tokenizer, "end"), *tokenizer.stop_ids})


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of bardlet's special tokens, by name; none for another template. Raises as `special_id` does."""
    if is_foreign(tokenizer):
        return {}
    return {name: special_id(tokenizer, name) for name in (*ROLES, "end")}


def encode(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False,
           special: Mapping[str, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation, and mark the tokens that the assistant wrote.

    Args:
        tokenizer: has the special tokens of the template.
        messages: in order. Characters that a tokenizer of characters does not know are left out.
        add_generation_prompt: append `<|assistant|>`, so that the assistant's answer comes next.
        special: the result of `special_tokens(tokenizer)`, to skip the lookup.

    Returns:
        (ids, answer): int64 and bool, both (T,). answer is True for the content of the assistant's messages and the
        `<|end|>` after each, which are the tokens to learn, and False for the role tokens. A message of weight 0 is
        not learned.

    Raises:
        BardletError: a tokenizer without these tokens, no messages, or an invalid message, by its number.
    """
    if is_foreign(tokenizer):
        return _foreign(tokenizer).encode(check(messages), add_generation_prompt)
    special = special or special_tokens(tokenizer)
    ids: list[int] = []
    answer: list[bool] = []
    for message in check(messages):
        text = escape_special(message["content"])
        if tokenizer.kind == "char":
            text, unseen = tokenizer.drop_unseen(text)
            if unseen:
                _note_unseen(tokenizer.hash)
        content = [*tokenizer.encode(text).tolist(), special["end"]]
        ids += [special[message["role"]], *content]
        learned = message["role"] == "assistant" and message.get("weight", 1) != 0
        answer += [False, *[learned] * len(content)]
    if add_generation_prompt:
        ids.append(special["assistant"])
        answer.append(False)
    return np.array(ids, dtype=np.int64), np.array(answer, dtype=bool)


@cache
def _note_unseen(tokenizer: str) -> None:
    """Log, once per tokenizer, that characters are left out."""
    log.warning("the conversations have characters that the tokenizer does not know; they are left out")


def escape_special(content: str) -> str:
    """Return `content` with every `<|` broken up, so that it spells no special token of the template."""
    return content.replace("<|", "< |")


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of the special token of a role, or of `end`.

    Raises:
        BardletError: the tokenizer has no such token; or text could become a special token although `<|` is broken
            up, because the tokenizer changes text first (other than to lower case) or has special tokens of another
            shape.
    """
    token = tokenizer.vocab.get(f"<|{name}|>")
    if token is None or token not in tokenizer.special:
        kind = {"char": "a character tokenizer", "byte": "a byte tokenizer"}.get(tokenizer.kind, "a tokenizer")
        raise BardletError(f"the model has {kind} without the token <|{name}|>, which chat needs; run `bardlet sft` on "
                           "the base model first, which adds it")
    _check_safety(tokenizer)
    return token


def _check_safety(tokenizer: Tokenizer) -> None:
    """Raise BardletError if text could become a special token although `<|` is broken up."""
    plain = tokenizer.kind in ("char", "byte") or tokenizer.is_plain_bpe
    if not plain or not all(text.startswith("<|") for text in tokenizer.special.values()):
        raise BardletError("the model's tokenizer can turn plain text into a special token, so it is unsafe for chat; "
                           "start from a model with a chat template of its own, or train a base model with bardlet")
