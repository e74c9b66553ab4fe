"""What occurs twice: how much of a text is a copy of itself, or of another text.

A long passage is found again by a number that stands for each window of it, a hash. Windows that begin at every place
are compared, so that it does not matter where in a line or a document a copy begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bardlet.tokenizer import code_points

SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""An odd multiplier that spreads bits well (the golden ratio's)."""
BASE = 0xD1B54A32D192ED03
"""Odd; each symbol further back counts so many times more."""
MAX_WINDOWS = 1 << 18
"""Windows of a text that are compared at most, or nearly so: those whose hashes end in zeros, wherever they stand."""


def hashes(symbols: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit number for each window of `length` symbols, a power of two; (max(0, N - length + 1),) uint64.

    Equal windows have equal numbers, others but by chance (one pair in 10^19). The number of a window is made of those
    of its halves, so that all of them take log2(length) passes (after Karp, Miller and Rosenberg, 1972).
    """
    found = (symbols.astype(np.uint64) + np.uint64(1)) * SPREAD
    found ^= found >> np.uint64(29)
    size, factor = 1, BASE
    while size < length:
        if len(found) <= size:
            return np.zeros(0, np.uint64)
        found = found[:-size] * np.uint64(factor) + found[size:]
        size, factor = 2 * size, factor * factor % 2**64
    found ^= found >> np.uint64(32)  # the last bits of a product know only the last bits of what went into it
    found *= SPREAD
    return found ^ (found >> np.uint64(29))


def overlap(train: np.ndarray, held: np.ndarray, length: int) -> tuple[float, float]:
    """(duplicated, contained): the share of the windows of `train` that are equal to one before them, and the share of
    those of `held` that occur in `train`, too. 0 for a text shorter than a window.

    Args:
        train, held: (N,), (M,) tokens.
        length: of a window, a power of two.
    """
    every = 1 << (len(train) // MAX_WINDOWS).bit_length()
    seen = _windows(train, length, every)
    if len(seen) < len(train) / every / 8:  # the same few windows again and again, and they were not chosen
        train, every = train[:MAX_WINDOWS], 1
        seen = _windows(train, length, every)
    found, different = _windows(held, length, every), np.unique(seen)
    return (1 - len(different) / len(seen) if len(seen) else 0.0,
            float(np.isin(found, different).mean()) if len(found) else 0.0)


def _windows(symbols: np.ndarray, length: int, every: int) -> np.ndarray:
    """The hashes of the windows of a long array, a piece at a time: those that are multiples of `every`."""
    piece = 1 << 22
    parts = [np.zeros(0, np.uint64)]
    for start in range(0, max(0, len(symbols) - length + 1), piece):
        some = hashes(symbols[start:start + piece + length - 1], length)
        parts.append(some[some & np.uint64(every - 1) == 0])
    return np.concatenate(parts)


@dataclass(frozen=True)
class Overlap:
    """How much of some texts stands in others."""

    share: float
    """Of the characters: those in a stretch of `length` characters or more that is a copy."""
    longest: str
    """The longest stretch of which each part of `length` characters is a copy."""
    whole: int
    """How many of the texts are a source from beginning to end."""


def find_copied(texts: Iterable[str], sources: Iterable[str], length: int = 32) -> Overlap:
    """How much of `texts` stands word for word in `sources`, in stretches of at least `length` characters.

    Args:
        sources: read once, one at a time.
        length: a power of two.
    """
    texts, whole = list(texts), set()
    wanted = [hashes(code_points(text), length) for text in texts]
    sought = np.unique(np.concatenate([np.zeros(0, np.uint64), *wanted]))
    seen = np.zeros(len(sought), bool)
    ends = {text.strip() for text in texts}
    for source in sources:
        if (stripped := source.strip()) in ends:
            whole.add(stripped)
        for some in _pieces(source, length):
            place = np.minimum(np.searchsorted(sought, some), max(0, len(sought) - 1))
            if len(sought):
                seen[place[sought[place] == some]] = True
    covered, longest = 0, ""
    for text, found in zip(texts, wanted, strict=True):
        inside = np.zeros(len(text), bool)
        for begin, end in _stretches(np.isin(found, sought[seen])):
            inside[begin:end + length - 1] = True
            longest = max(longest, text[begin:end + length - 1], key=len)
        covered += int(inside.sum())
    return Overlap(covered / max(1, sum(map(len, texts))), longest, sum(text.strip() in whole for text in texts))


def _pieces(text: str, length: int) -> Iterator[np.ndarray]:
    """The hashes of all windows of a text, some at a time."""
    piece = 1 << 20
    for start in range(0, len(text), piece):
        yield hashes(code_points(text[start:start + piece + length - 1]), length)


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of each unbroken run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
