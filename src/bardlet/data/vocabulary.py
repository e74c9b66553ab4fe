"""The tokenizer of a corpus: its kind, its size, and the part of the text that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bardlet import tokenizer as tokenization
from bardlet.data.corpus import Corpus, dev_split_start
from bardlet.data.named import Progress
from bardlet.data.statistics import measure_corpus
from bardlet.tokenizer import Tokenizer

READ = 1 << 20
"""Tokens of a shard that are read at once."""


def train_tokenizer(
    corpus: Corpus, kind: str, vocab_size: int | None, progress: Progress | None, cache: Path | None, dev: bool,
    distinct: int | None = None,
) -> tuple[Tokenizer, str, int | None]:
    """Return (tokenizer, reason, characters of the text, or None if they were not counted).

    dev: train bpe without the development split. distinct: see `spread_sample`. The tokenizer of a normalized corpus
    normalizes prompts, too.
    """
    tokenizer, reason, characters = _trained(corpus, kind, vocab_size, progress, cache, dev, distinct)
    return tokenizer.with_nfc() if corpus.normalize else tokenizer, reason, characters


def _trained(
    corpus: Corpus, kind: str, vocab_size: int | None, progress: Progress | None, cache: Path | None, dev: bool,
    distinct: int | None,
) -> tuple[Tokenizer, str, int | None]:
    if kind == "byte":
        return tokenization.train_byte(corpus.needs_separator), "byte: as requested; every byte is a token", None
    statistics = measure_corpus(corpus, progress, cache)
    characters, alphabet = statistics.characters, set(statistics.alphabet)
    if kind == "auto" and vocab_size is None:
        kind, vocab_size, reason = tokenization.choose_kind(characters, len(alphabet))
    else:
        kind = "bpe" if kind == "auto" else kind
        vocab_size = vocab_size or tokenization.suggest_vocab_size(characters, len(alphabet))
        size = f"{len(alphabet):,} distinct characters" if kind == "char" else f"{vocab_size:,} tokens"
        reason = f"{kind}: as requested; {size}"
    if kind == "char":
        return tokenization.train_char(alphabet, corpus.needs_separator), reason, characters
    if kind == "byte":
        return tokenization.train_byte(corpus.needs_separator), reason, characters
    if progress:
        progress("training the bpe tokenizer", 0, None)
    limit = dev_split_start(statistics.train_characters) if dev else statistics.train_characters
    sample = tokenization.spread_sample(lambda: _first(corpus, limit), limit, distinct)
    trained = tokenization.train_bpe(sample, int(vocab_size or 0), bounded=True)
    return trained, reason + note_small_vocabulary(trained, vocab_size), characters


def note_small_vocabulary(trained: Tokenizer, requested: int | None) -> str:
    """Return a note for the reason if the text yields a smaller vocabulary than requested, else an empty string."""
    small = trained.vocab_size < (requested or 0)
    return f" (the text has only enough repetition for {trained.vocab_size:,})" if small else ""


def dev_start(corpus: Corpus, tokens: np.ndarray, tokenizer: Tokenizer, characters: int) -> int:
    """Return the number of tokens before the development split, with the last that has characters of both splits."""
    kept = sum(len(text.encode()) for blocks in _first(corpus, dev_split_start(characters)) for text in blocks)
    sizes = np.array([len(tokenizer.bytes_of(i, skip_special=True)) for i in range(tokenizer.vocab_size)])
    for start in range(0, len(tokens), READ):
        ends = sizes[tokens[start:start + READ]].cumsum()
        if ends[-1] >= kept:
            return start + int(np.searchsorted(ends, kept)) + 1
        kept -= int(ends[-1])
    return len(tokens)


def _first(corpus: Corpus, characters: int) -> Iterator[Iterator[str]]:
    """Yield the documents of the training split, in blocks, up to a number of characters."""
    def limited(blocks: Iterator[str]) -> Iterator[str]:
        nonlocal characters
        for text in blocks:
            yield text[:characters]
            characters -= len(text[:characters])

    for _, blocks in corpus.blocks("train"):
        if not characters:
            return
        yield limited(blocks)
