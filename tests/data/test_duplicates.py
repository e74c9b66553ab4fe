"""What occurs twice is found, wherever it begins, and nothing else is."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardlet.data import duplicates


def noise(length: int, seed: int) -> np.ndarray:
    """Symbols in which nothing long is repeated."""
    return np.random.default_rng(seed).integers(60, size=length)


@given(st.lists(st.integers(0, 3), max_size=60), st.sampled_from([1, 2, 4, 8]))
def test_equal_windows_have_equal_hashes_and_others_do_not(symbols: list[int], length: int) -> None:
    """As many different hashes as different windows, in the same places."""
    windows = [tuple(symbols[i:i + length]) for i in range(max(0, len(symbols) - length + 1))]
    found = duplicates.hashes(np.array(symbols, np.int64), length).tolist()
    assert len(found) == len(windows)
    assert [found.index(h) for h in found] == [windows.index(w) for w in windows]


@pytest.mark.parametrize("length", [5_000, 3_000_000])
def test_the_share_of_duplicates(length: int) -> None:
    """A text, and three quarters of it once more, at another place; short and so long that only some are compared."""
    text = noise(length, 1)
    assert duplicates.overlap(text, text[:0], 64)[0] < 0.001
    twice = np.concatenate([text, noise(37, 2), text[: 3 * length // 4]])
    assert duplicates.overlap(twice, text[:0], 64)[0] == pytest.approx(3 / 7, abs=0.02)


@pytest.mark.parametrize("length", [10_000, 3_000_000])
@pytest.mark.parametrize("symbol", range(8))
def test_a_loop_is_all_duplicates(symbol: int, length: int) -> None:
    """Whatever its one window's hash is."""
    loop = np.full(length, symbol, np.uint16)
    duplicated, contained = duplicates.overlap(loop, loop[:999], 64)
    assert duplicated > 0.99 and contained == 1


@pytest.mark.parametrize("length", [5_000, 3_000_000])
def test_the_share_that_is_contained(length: int) -> None:
    """Half of a part was taken from the whole."""
    whole, other = noise(length, 1), noise(length // 10, 2)
    part = np.concatenate([other, whole[777 : 777 + len(other)]])
    windows, copies = len(part) - 63, len(other) - 63
    assert duplicates.overlap(whole, part, 64)[1] == pytest.approx(copies / windows, abs=0.01)
    assert duplicates.overlap(whole, other, 64)[1] == 0.0


def test_too_short_for_a_window() -> None:
    for text in ([], [1], [1] * 63):
        assert duplicates.overlap(np.array(text, np.int64), noise(999, 0), 64) == (0.0, 0.0)
        assert duplicates.overlap(noise(999, 0), np.array(text, np.int64), 64) == (0.0, 0.0)
    assert duplicates.find_copied([], ["x"]).share == 0.0
    assert duplicates.find_copied(["x" * 31], ["x" * 31]).share == 0.0


def test_what_was_copied() -> None:
    """100 of 300 characters, in the middle of a word; the longest stretch is shown; whole texts are counted."""
    chance = random.Random(0)
    source = "".join(chance.choices("abcdefgh ", k=3_000_000))  # longer than a piece of it is
    own = "".join(chance.choices("ijklmnop ", k=200))
    copy = source[(1 << 20) - 50 : (1 << 20) + 50]  # over the edge of a piece
    found = duplicates.find_copied([own[:90] + copy + own[90:]], ["x", source])
    assert found.share == pytest.approx(1 / 3) and found.longest == copy and found.whole == 0
    found = duplicates.find_copied(["Anna\n", "Bertha", "Anna"], ["Anna", "Bert"])
    assert found.whole == 2 and found.share == 0.0


def test_copies_that_overlap_count_once() -> None:
    source = "".join(random.Random(1).choices("abcdefgh", k=400))
    text = source[:40] + source[300:340] + "?" + source[:32]
    assert duplicates.find_copied([text], [source]).share == pytest.approx(112 / 113)
