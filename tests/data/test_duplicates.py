"""Duplicates are detected at any offset, without false positives."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardlet.data import duplicates


def noise(length: int, seed: int) -> np.ndarray:
    """Return random symbols without long repetitions."""
    return np.random.default_rng(seed).integers(60, size=length)


@given(st.lists(st.integers(0, 3), max_size=60), st.sampled_from([1, 2, 4, 8]))
def test_equal_windows_have_equal_hashes_and_others_do_not(symbols: list[int], length: int) -> None:
    """The hashes repeat at the same positions as the windows."""
    windows = [tuple(symbols[i:i + length]) for i in range(max(0, len(symbols) - length + 1))]
    hashes = duplicates.hashes(np.array(symbols, np.int64), length).tolist()
    assert len(hashes) == len(windows)
    assert [hashes.index(h) for h in hashes] == [windows.index(w) for w in windows]


@pytest.mark.parametrize("length", [5_000, 3_000_000])
def test_duplicated_share(length: int) -> None:
    """Three quarters of a text repeat at another offset, in a short text and in one long enough for sampling."""
    text = noise(length, 1)
    assert duplicates.overlap(text, text[:0], 64)[0] < 0.001
    twice = np.concatenate([text, noise(37, 2), text[: 3 * length // 4]])
    assert duplicates.overlap(twice, text[:0], 64)[0] == pytest.approx(3 / 7, abs=0.02)


@pytest.mark.parametrize("length", [10_000, 3_000_000])
@pytest.mark.parametrize("symbol", range(8))
def test_a_loop_is_all_duplicates(symbol: int, length: int) -> None:
    """True for any hash of its only window, also if the sample misses it."""
    loop = np.full(length, symbol, np.uint16)
    duplicated, contained = duplicates.overlap(loop, loop[:999], 64)
    assert duplicated > 0.99 and contained == 1


@pytest.mark.parametrize("length", [5_000, 3_000_000])
def test_contained_share(length: int) -> None:
    """Half of a part is copied from the whole text."""
    whole, other = noise(length, 1), noise(length // 10, 2)
    part = np.concatenate([other, whole[777 : 777 + len(other)]])
    windows, copies = len(part) - 63, len(other) - 63
    assert duplicates.overlap(whole, part, 64)[1] == pytest.approx(copies / windows, abs=0.01)
    assert duplicates.overlap(whole, other, 64)[1] == 0.0


def test_texts_shorter_than_a_window() -> None:
    for text in ([], [1], [1] * 63):
        assert duplicates.overlap(np.array(text, np.int64), noise(999, 0), 64) == (0.0, 0.0)
        assert duplicates.overlap(noise(999, 0), np.array(text, np.int64), 64) == (0.0, 0.0)
    assert duplicates.find_copied([], ["x"]).share == 0.0
    assert duplicates.find_copied(["x" * 31], ["x" * 31]).share == 0.0


def test_copied_share_longest_stretch_and_whole_texts() -> None:
    """100 of 300 characters are copied, from the middle of a word on; texts that equal a source are counted."""
    random_ = random.Random(0)
    source = "".join(random_.choices("abcdefgh ", k=3_000_000))  # longer than a chunk
    own = "".join(random_.choices("ijklmnop ", k=200))
    copy = source[(1 << 20) - 50 : (1 << 20) + 50]  # across the edge of a chunk
    overlap = duplicates.find_copied([own[:90] + copy + own[90:]], ["x", source])
    assert overlap.share == pytest.approx(1 / 3) and overlap.longest == copy and overlap.whole == 0
    overlap = duplicates.find_copied(["Anna\n", "Bertha", "Anna"], ["Anna", "Bert"])
    assert overlap.whole == 2 and overlap.share == 0.0


def test_overlapping_copies_count_once() -> None:
    source = "".join(random.Random(1).choices("abcdefgh", k=400))
    text = source[:40] + source[300:340] + "?" + source[:32]
    assert duplicates.find_copied([text], [source]).share == pytest.approx(112 / 113)
