"""Duplicate and train/val-leak detection: the share of a text that copies itself or another text.

Every window of a text gets a hash, at every offset, so a copy is detected wherever in a line or document it begins.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bardlet.tokenizer import code_points

SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""An odd multiplier that spreads bits well (the golden ratio's)."""
BASE = 0xD1B54A32D192ED03
"""Odd base of the polynomial hash: the weight of a symbol grows by this factor per position further back."""
MAX_WINDOWS = 1 << 18
"""Approximate limit of the windows compared per text: a sample by hash (trailing zeros), not by position."""


CHUNK, THREADS = 1 << 19, 3
"""Symbols that a thread hashes at once, and threads."""


def hashes(symbols: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit hash of each window of `length` symbols, a power of two: (max(0, N - length + 1),) uint64.

    Equal windows have equal hashes; others collide by chance (one pair in 10^19). The hash of a window is computed from
    those of its halves, so log2(length) passes suffice for all windows (after Karp, Miller and Rosenberg, 1972).
    """
    hashed = (symbols.astype(np.uint64) + np.uint64(1)) * SPREAD
    hashed ^= hashed >> np.uint64(29)
    size, factor = 1, BASE
    while size < length:
        if len(hashed) <= size:
            return np.zeros(0, np.uint64)
        hashed = hashed[:-size] * np.uint64(factor) + hashed[size:]
        size, factor = 2 * size, factor * factor % 2**64
    hashed ^= hashed >> np.uint64(32)  # the low bits of a product depend only on the low bits of its factors
    hashed *= SPREAD
    return hashed ^ (hashed >> np.uint64(29))


def overlap(train: np.ndarray, val: np.ndarray, length: int) -> tuple[float, float]:
    """Return (duplicated, contained), both 0 for a text shorter than a window.

    duplicated: share of the windows of `train` that repeat an earlier one.
    contained: share of the windows of `val` that also occur in `train`.

    Args:
        train, val: (N,), (M,) tokens.
        length: of a window, a power of two.
    """
    every = 1 << (len(train) // MAX_WINDOWS).bit_length()
    seen = _windows(train, length, every)
    if len(seen) < len(train) / every / 8:  # a few windows repeat all the time, and the sample missed them
        train, every = train[:MAX_WINDOWS], 1
        seen = _windows(train, length, every)
    val_windows, different = _windows(val, length, every), np.unique(seen)
    return (1 - len(different) / len(seen) if len(seen) else 0.0,
            float(np.isin(val_windows, different).mean()) if len(val_windows) else 0.0)


def _windows(symbols: np.ndarray, length: int, every: int) -> np.ndarray:
    """Return the hashes of windows that are multiples of `every`, computed in chunks because the array may be long."""
    def sampled(start: int) -> np.ndarray:
        hashed = hashes(read(symbols, start, min(len(symbols), start + CHUNK + length - 1)), length)
        return hashed[hashed & np.uint64(every - 1) == 0]

    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(sampled, range(0, max(0, len(symbols) - length + 1), CHUNK))
        return np.concatenate([np.zeros(0, np.uint64), *parts])


def read(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return a part of an array; of a memory-mapped one without its pages, which would count as memory in use."""
    if not isinstance(array, np.memmap) or array.filename is None or not isinstance(array.base, mmap.mmap):
        return array[start:stop]
    size = array.dtype.itemsize
    return np.fromfile(array.filename, array.dtype, stop - start, offset=array.offset + start * size)


@dataclass(frozen=True)
class Overlap:
    """Verbatim overlap of texts with their sources."""

    share: float
    """Share of the characters that are in a copied stretch of at least `length` characters."""
    longest: str
    """The longest stretch in which every window of `length` characters is a copy."""
    whole: int
    """Number of texts that equal a source from beginning to end."""


def find_copied(texts: Iterable[str], sources: Iterable[str], length: int = 32) -> Overlap:
    """Return how much of `texts` occurs verbatim in `sources`, in stretches of at least `length` characters.

    Args:
        sources: read once, one at a time.
        length: a power of two.
    """
    texts, whole = list(texts), set()
    text_hashes = [hashes(code_points(text), length) for text in texts]
    unique_hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *text_hashes]))
    seen = np.zeros(len(unique_hashes), bool)
    stripped_texts = {text.strip() for text in texts}
    for source in sources:
        if (stripped := source.strip()) in stripped_texts:
            whole.add(stripped)
        for hashed in _hashed_chunks(source, length):
            index = np.minimum(np.searchsorted(unique_hashes, hashed), max(0, len(unique_hashes) - 1))
            if len(unique_hashes):
                seen[index[unique_hashes[index] == hashed]] = True
    covered, longest = 0, ""
    for text, hashed in zip(texts, text_hashes, strict=True):
        inside = np.zeros(len(text), bool)
        for begin, end in _runs(np.isin(hashed, unique_hashes[seen])):
            inside[begin:end + length - 1] = True
            longest = max(longest, text[begin:end + length - 1], key=len)
        covered += int(inside.sum())
    return Overlap(covered / max(1, sum(map(len, texts))), longest, sum(text.strip() in whole for text in texts))


def _hashed_chunks(text: str, length: int) -> Iterator[np.ndarray]:
    """Yield the hashes of all windows of a text, a chunk at a time."""
    chunk = 1 << 20
    for start in range(0, len(text), chunk):
        yield hashes(code_points(text[start:start + chunk + length - 1]), length)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return (begin, end) of each unbroken run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
