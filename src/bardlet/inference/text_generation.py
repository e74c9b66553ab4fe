"""A model and its tokenizer write: prompts in characters, texts out, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bardlet.inference import generate
from bardlet.tokenizer import StreamDecoder, Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str | None, documents: int = 2) -> list[int]:
    """The tokens of `prompt`. Without one: the separator, where documents begin; else a line break, or token 0.

    In a text of a single document there is no separator to learn from, though a BPE tokenizer has one.
    """
    if prompt:
        tokenizer.check(prompt)
        return [int(i) for i in tokenizer.encode(prompt)]
    if tokenizer.eos_id is not None and documents > 1:
        return [tokenizer.eos_id]
    if tokenizer.kind != "char" or "\n" in (tokenizer.alphabet or ""):
        return [int(i) for i in tokenizer.encode("\n")][:1]
    return [0]


def complete(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """New tokens for each prompt, up to the separator; spare rows of a vocabulary mean nothing and are left out."""
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    made = generate.generate(model, prompts, tokens, stop_ids=stop, **options)
    return [[token for token in ids if token < tokenizer.vocab_size] for ids in made]


def stream(model: Any, tokenizer: Tokenizer, prompt: list[int], tokens: int, out: Callable[[str], object],
           **options: Any) -> int:
    """Hand each piece of text to `out` as soon as its characters are whole; returns the number of tokens."""
    decoder, count = StreamDecoder(tokenizer, skip_special=True), 0
    for token in prompt:  # a prompt may end inside a character's bytes, where the first new token goes on
        decoder.feed(token)
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    for ids in generate.stream(model, [prompt], tokens, stop_ids=stop, **options):
        [token] = (i for i in ids if i is not None)  # None is a row that has ended, and there is only one
        out(decoder.feed(token) if token < tokenizer.vocab_size else "")
        count += 1
    out(decoder.finish())
    return count


def generate_text(model: Any, tokenizer: Tokenizer, prompt: str | None, *, documents: int, tokens: int, **options: Any) -> str:
    """A text by `model`, for a model card or a page; `documents`: of how many its training text consisted.

    A model of many documents may end one after a few tokens (a name, say): then several follow, a line each. options:
    of `generate.stream`.
    """
    rows = 1 if documents == 1 else 8
    made = complete(model, tokenizer, [prompt_ids(tokenizer, prompt, documents)] * rows, tokens, **options)
    shown = next((n for n in range(1, rows) if sum(map(len, made[:n])) >= tokens // 2), rows)
    return "\n".join(tokenizer.decode(ids, skip_special=True) for ids in made[:shown])
