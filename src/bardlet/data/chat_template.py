"""The one chat template: who says what, as tokens.

    <|user|>What is two and two?<|end|><|assistant|>Four.<|end|>

A special token for each role, the words, and `<|end|>`. What a person writes can never become one of these tokens: in
content `<|` is written `< |`, here and in the template that transformers reads, so that both give the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bardlet.data.records import ROLES, Message, check
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
"""The same in Jinja, which transformers runs in a sandbox: `chat_template` of tokenizer_config.json."""


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the template's special tokens, by name. Raises as `special_id` does."""
    return {name: special_id(tokenizer, name) for name in (*ROLES, "end")}


def encode(tokenizer: Tokenizer, messages: Sequence[Message], ask: bool = False,
           marks: Mapping[str, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as tokens, and which of them the assistant wrote.

    Args:
        words: a tokenizer with the tokens of the template.
        messages: in their order.
        ask: let the assistant's next answer begin.
        marks: those of `words`, where somebody has looked them up already.

    Returns:
        (ids, answer): int64 and boolean, both (T,). answer is True for the words of the assistant's messages and the
        `<|end|>` behind each, which is what a model is to learn: never for what begins a message.

    Raises:
        BardletError: a tokenizer without these tokens; no message, or one that is none, and which.
    """
    marks = marks or special_tokens(tokenizer)
    ids: list[int] = []
    answer: list[bool] = []
    for message in check(messages):
        said = [*tokenizer.encode(escape_special(message["content"])).tolist(), marks["end"]]
        ids += [marks[message["role"]], *said]
        answer += [False, *[message["role"] == "assistant"] * len(said)]
    if ask:
        ids.append(marks["assistant"])
        answer.append(False)
    return np.array(ids, dtype=np.int64), np.array(answer, dtype=bool)


def escape_special(content: str) -> str:
    """`content` with nothing in it that reads like a special token of the template."""
    return content.replace("<|", "< |")


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of the special token of a role, or of `end`.

    Raises:
        BardletError: the tokenizer has none; or it is one by which a text could become a special token although `<|` is
            broken in it: it changes texts before it looks (other than to lower case), or has tokens of another shape.
    """
    token = tokenizer.vocab.get(f"<|{name}|>")
    if token is None or token not in tokenizer.special:
        raise BardletError(f"the model's tokenizer has no token <|{name}|>, so it cannot hold a conversation; "
                           "train the base with --tokenizer bpe")
    if not tokenizer.closed or not all(text.startswith("<|") for text in tokenizer.special.values()):
        raise BardletError("with the model's tokenizer a text could become a special token, so it cannot hold a "
                           "conversation; train the base with --tokenizer bpe")
    return token


