"""Prompts and texts in characters: where a text begins, where it ends, and that pieces make up the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bardlet import tokenizer
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference import text_generation as writing
from bardlet.tokenizer import Tokenizer

LETTERS = tokenizer.train_char("\n abcdé", separator=False)
NAMES = tokenizer.train_char("\n abcdé", separator=True)
BYTES = tokenizer.train_byte(separator=True)


class Says(nn.Module):
    """In place of a model: behind a prompt of so many tokens it says what it was told to, again and again."""

    def __init__(self, tokenizer: Tokenizer, says: list[int], prompt: int = 1, spare: int = 0) -> None:
        super().__init__()
        self.config = ModelConfig("bigram", tokenizer.vocab_size + spare, block_size=512)
        self.says, self.prompt = says, prompt
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, idx_BT: Tensor) -> Tensor:
        B, T = idx_BT.shape
        logits_BTV = torch.zeros(B, T, self.config.vocab_size)
        for t in range(T):
            logits_BTV[:, t, self.says[max(0, t + 1 - self.prompt) % len(self.says)]] = 100.0
        return logits_BTV


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text)]


def eos(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_id is not None
    return tokenizer.eos_id


# ---------------------------------------------------------------------------- prompts


def test_a_prompt_is_encoded_and_one_with_unknown_characters_is_refused() -> None:
    assert writing.prompt_ids(LETTERS, "bad") == ids(LETTERS, "bad")
    with pytest.raises(BardletError, match="is not one of the 7 characters that this model has seen"):
        writing.prompt_ids(LETTERS, "bard")


def test_without_a_prompt_a_text_begins_where_documents_do() -> None:
    """The separator, where the training text had several documents; else a line break; else the first character."""
    assert writing.prompt_ids(NAMES, None) == [eos(NAMES)]
    assert writing.prompt_ids(NAMES, "") == [eos(NAMES)]
    assert writing.prompt_ids(NAMES, None, documents=1) == ids(NAMES, "\n")
    assert writing.prompt_ids(LETTERS, None) == ids(LETTERS, "\n")
    assert writing.prompt_ids(BYTES, None, documents=1) == ids(BYTES, "\n")
    assert writing.prompt_ids(tokenizer.train_char("abc", separator=False), None) == [0]


# ---------------------------------------------------------------------------- texts


def test_a_text_ends_with_the_separator_and_spare_rows_mean_nothing() -> None:
    """A vocabulary that was rounded up has tokens without a text: they are left out."""
    spare = NAMES.vocab_size
    model = Says(NAMES, [*ids(NAMES, "ab"), spare, *ids(NAMES, "c"), eos(NAMES), *ids(NAMES, "d")], spare=8)
    made = writing.complete(model, NAMES, [[eos(NAMES)]], 20, temperature=0)
    assert made == [[*ids(NAMES, "abc"), eos(NAMES)]]
    model = Says(LETTERS, ids(LETTERS, "abc"))  # nothing ends a text of a tokenizer without a separator
    assert writing.complete(model, LETTERS, [[0]], 7, temperature=0) == [ids(LETTERS, "abcabca")]


@pytest.mark.parametrize("words", [LETTERS, NAMES, BYTES], ids=["letters", "names", "bytes"])
def test_pieces_make_up_the_whole(tokenizer: Tokenizer) -> None:
    """Each piece is whole characters: é is two bytes, and comes with the second."""
    said = "abé" if tokenizer.eos_id is None else "abé" * 4
    model = Says(tokenizer, ids(tokenizer, "abé"))
    pieces: list[str] = []
    count = writing.stream(model, tokenizer, ids(tokenizer, "\n"), len(ids(tokenizer, said)), pieces.append, temperature=0)
    assert "".join(pieces) == said and count == len(ids(tokenizer, said))
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_that_ends_inside_a_character_is_finished_by_the_model() -> None:
    first, second = ids(BYTES, "é")
    pieces: list[str] = []
    writing.stream(Says(BYTES, [second, eos(BYTES)]), BYTES, [first], 5, pieces.append, temperature=0)
    assert "".join(pieces) == "é"
    pieces.clear()
    writing.stream(Says(BYTES, [first]), BYTES, ids(BYTES, "a"), 1, pieces.append, temperature=0)
    assert "".join(pieces) == "\ufffd"  # a character that was never finished


def test_spare_rows_are_not_streamed() -> None:
    pieces: list[str] = []
    model = Says(NAMES, [NAMES.vocab_size, *ids(NAMES, "b"), eos(NAMES)], spare=1)
    assert writing.stream(model, NAMES, [eos(NAMES)], 9, pieces.append, temperature=0) == 3
    assert "".join(pieces) == "b"


def test_short_documents_follow_one_another() -> None:
    """A model of names shows as many as make up half of what was asked for, a line each; of one text it shows one."""
    how: dict[str, Any] = {"temperature": 1.0, "top_k": None, "seed": 0}
    model = Says(NAMES, [*ids(NAMES, "ab"), eos(NAMES)])
    assert writing.generate_text(model, NAMES, None, documents=1000, tokens=20, **how) == "ab\nab\nab\nab"  # 4 of 3 tokens
    assert writing.generate_text(model, NAMES, None, documents=1000, tokens=400, **how) == "\n".join(["ab"] * 8)  # no more
    long = Says(NAMES, ids(NAMES, "abcd"))
    assert writing.generate_text(long, NAMES, None, documents=1000, tokens=8, **how) == "abcdabcd"
    assert writing.generate_text(Says(LETTERS, ids(LETTERS, "abcd")), LETTERS, None, documents=1, tokens=6, **how) == "abcdab"


def test_a_text_depends_on_its_seed_alone() -> None:
    class Even(Says):
        def forward(self, idx_BT: Tensor) -> Tensor:
            return 0 * super().forward(idx_BT)

    how: dict[str, Any] = {"documents": 1, "tokens": 60, "temperature": 1.0}
    one, again, other = (writing.generate_text(Even(LETTERS, [0]), LETTERS, "a", top_k=None, seed=s, **how) for s in (1, 1, 2))
    assert one == again != other and len(one) == 60
    assert set(writing.generate_text(Even(LETTERS, [0]), LETTERS, "a", top_k=1, seed=1, **how)) == {one_of(LETTERS)}


def one_of(tokenizer: Tokenizer) -> str:
    """What the likeliest of equal logits is: the one that `topk` names first."""
    return tokenizer.decode([int(torch.zeros(1, tokenizer.vocab_size).double().topk(1).indices[0, 0])])
