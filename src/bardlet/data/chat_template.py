"""The chat template: conversations as tokens.

    <|user|>What is two and two?<|end|><|assistant|>Four.<|end|>

Each message is the special token of its role, its content, and `<|end|>`. Content can never become a special token:
`<|` in it is written `< |`, both here and in the template that transformers reads, so both give the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bardlet.data.forms import ROLES, Message
from bardlet.data.records import check
from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer

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


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the template's special tokens, by name. Raises as `special_id` does."""
    return {name: special_id(tokenizer, name) for name in (*ROLES, "end")}


def encode(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False,
           special: Mapping[str, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Encode a conversation, and mark the tokens that the assistant wrote.

    Args:
        tokenizer: has the special tokens of the template.
        messages: in order.
        add_generation_prompt: append `<|assistant|>`, so that the assistant's answer comes next.
        special: the result of `special_tokens(tokenizer)`, to skip the lookup.

    Returns:
        (ids, answer): int64 and bool, both (T,). answer is True for the content of the assistant's messages and the
        `<|end|>` after each, which are the tokens to learn, and False for the role tokens. A message of weight 0 is
        not learned.

    Raises:
        BardletError: a tokenizer without these tokens, no messages, or an invalid message, by its number.
    """
    special = special or special_tokens(tokenizer)
    ids: list[int] = []
    answer: list[bool] = []
    for message in check(messages):
        content = [*tokenizer.encode(escape_special(message["content"])).tolist(), special["end"]]
        ids += [special[message["role"]], *content]
        learned = message["role"] == "assistant" and message.get("weight", 1) != 0
        answer += [False, *[learned] * len(content)]
    if add_generation_prompt:
        ids.append(special["assistant"])
        answer.append(False)
    return np.array(ids, dtype=np.int64), np.array(answer, dtype=bool)


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
        raise BardletError(f"the model's tokenizer has no token <|{name}|>, which chat needs; "
                           "train the base model with --tokenizer bpe")
    if not tokenizer.is_plain_bpe or not all(text.startswith("<|") for text in tokenizer.special.values()):
        raise BardletError("the model's tokenizer can turn plain text into a special token, so it is unsafe for chat; "
                           "train the base model with --tokenizer bpe")
    return token
