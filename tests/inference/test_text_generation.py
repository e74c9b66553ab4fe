"""Prompts, completions and streamed text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bardlet import tokenizer
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.inference import text_generation
from bardlet.tokenizer import Tokenizer

LETTERS = tokenizer.train_char("\n abcdé", separator=False)
NAMES = tokenizer.train_char("\n abcdé", separator=True)
BYTES = tokenizer.train_byte(separator=True)


class Repeats(nn.Module):
    """A fake model: after a prompt of `prompt` tokens it repeats `output` forever."""

    def __init__(self, tokenizer: Tokenizer, output: list[int], prompt: int = 1, spare: int = 0) -> None:
        super().__init__()
        self.config = ModelConfig("bigram", tokenizer.vocab_size + spare, block_size=512)
        self.output, self.prompt = output, prompt
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, idx_BT: Tensor) -> Tensor:
        B, T = idx_BT.shape
        logits_BTV = torch.zeros(B, T, self.config.vocab_size)
        for t in range(T):
            logits_BTV[:, t, self.output[max(0, t + 1 - self.prompt) % len(self.output)]] = 100.0
        return logits_BTV


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text)]


def eos(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_id is not None
    return tokenizer.eos_id


# ---------------------------------------------------------------------------- prompts


def test_a_prompt_is_encoded_and_unknown_characters_raise() -> None:
    assert text_generation.prompt_ids(LETTERS, "bad") == ids(LETTERS, "bad")
    with pytest.raises(BardletError, match="is not among the 7 characters that the tokenizer knows"):
        text_generation.prompt_ids(LETTERS, "bard")


def test_the_default_prompt_starts_a_document() -> None:
    """The separator if the training text had several documents; else a line break; else token 0."""
    assert text_generation.prompt_ids(NAMES, None) == [eos(NAMES)]
    assert text_generation.prompt_ids(NAMES, "") == [eos(NAMES)]
    assert text_generation.prompt_ids(NAMES, None, documents=1) == ids(NAMES, "\n")
    assert text_generation.prompt_ids(LETTERS, None) == ids(LETTERS, "\n")
    assert text_generation.prompt_ids(BYTES, None, documents=1) == ids(BYTES, "\n")
    assert text_generation.prompt_ids(tokenizer.train_char("abc", separator=False), None) == [0]


# ---------------------------------------------------------------------------- texts


def test_completions_end_at_the_separator_and_drop_padding_ids() -> None:
    """A vocabulary that was rounded up has ids without text."""
    spare = NAMES.vocab_size
    model = Repeats(NAMES, [*ids(NAMES, "ab"), spare, *ids(NAMES, "c"), eos(NAMES), *ids(NAMES, "d")], spare=8)
    completions = text_generation.complete(model, NAMES, [[eos(NAMES)]], 20, temperature=0)
    assert completions == [[*ids(NAMES, "abc"), eos(NAMES)]]
    model = Repeats(LETTERS, ids(LETTERS, "abc"))  # without a separator, only the token limit ends it
    assert text_generation.complete(model, LETTERS, [[0]], 7, temperature=0) == [ids(LETTERS, "abcabca")]


@pytest.mark.parametrize("tokenizer", [LETTERS, NAMES, BYTES], ids=["letters", "names", "bytes"])
def test_stream_yields_whole_characters(tokenizer: Tokenizer) -> None:
    """One piece per token, then the rest: é is two bytes and arrives with the second."""
    text = "abé" if tokenizer.eos_id is None else "abé" * 4
    tokens = ids(tokenizer, text)
    model = Repeats(tokenizer, ids(tokenizer, "abé"))
    pieces = list(text_generation.stream(model, tokenizer, ids(tokenizer, "\n"), len(tokens), temperature=0))
    assert "".join(pieces) == text and len(pieces) == len(tokens) + 1
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_yields_each_piece_before_the_next_token() -> None:
    """The caller gets a piece as soon as it is generated; closing the stream restores the model's mode."""
    model = Repeats(LETTERS, ids(LETTERS, "abc")).train()
    pieces = text_generation.stream(model, LETTERS, [0], 10**9, temperature=0)
    assert [next(pieces) for _ in range(4)] == ["a", "b", "c", "a"] and not model.training
    pieces.close()  # type: ignore[attr-defined]
    assert model.training


def test_stream_completes_a_character_that_the_prompt_started() -> None:
    first, second = ids(BYTES, "é")
    pieces = text_generation.stream(Repeats(BYTES, [second, eos(BYTES)]), BYTES, [first], 5, temperature=0)
    assert "".join(pieces) == "é"
    pieces = text_generation.stream(Repeats(BYTES, [first]), BYTES, ids(BYTES, "a"), 1, temperature=0)
    assert list(pieces) == ["", "\ufffd"]  # the character stays incomplete


def test_stream_drops_padding_ids() -> None:
    model = Repeats(NAMES, [NAMES.vocab_size, *ids(NAMES, "b"), eos(NAMES)], spare=1)
    assert list(text_generation.stream(model, NAMES, [eos(NAMES)], 9, temperature=0)) == ["", "b", "", ""]


def test_generate_text_joins_short_documents() -> None:
    """With many documents, as many as fill half of the token limit, one per line; with one document, a single text."""
    options: dict[str, Any] = {"temperature": 1.0, "top_k": None, "seed": 0}
    model = Repeats(NAMES, [*ids(NAMES, "ab"), eos(NAMES)])
    text = text_generation.generate_text(model, NAMES, None, documents=1000, tokens=20, **options)
    assert text == "ab\nab\nab\nab"  # 4 documents of 3 tokens
    text = text_generation.generate_text(model, NAMES, None, documents=1000, tokens=400, **options)
    assert text == "\n".join(["ab"] * 8)  # at most 8
    long = Repeats(NAMES, ids(NAMES, "abcd"))
    assert text_generation.generate_text(long, NAMES, None, documents=1000, tokens=8, **options) == "abcdabcd"
    single = Repeats(LETTERS, ids(LETTERS, "abcd"))
    assert text_generation.generate_text(single, LETTERS, None, documents=1, tokens=6, **options) == "abcdab"


def test_generate_text_depends_on_the_seed_alone() -> None:
    class Uniform(Repeats):
        def forward(self, idx_BT: Tensor) -> Tensor:
            return 0 * super().forward(idx_BT)

    def sample(top_k: int | None, seed: int) -> str:
        return text_generation.generate_text(Uniform(LETTERS, [0]), LETTERS, "a", documents=1, tokens=60,
                                             temperature=1.0, top_k=top_k, seed=seed)  # fmt: skip

    first, again, other = (sample(None, seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 60
    assert set(sample(1, 1)) == {first_of_ties(LETTERS)}


def first_of_ties(tokenizer: Tokenizer) -> str:
    """Return the character that `topk` picks among equal logits."""
    return tokenizer.decode([int(torch.zeros(1, tokenizer.vocab_size).double().topk(1).indices[0, 0])])
