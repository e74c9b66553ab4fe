"""N-gram losses against a direct implementation of the definition."""

from collections import Counter

import numpy as np
import pytest

from bardlet.data import ngram


def reference_losses(train: list[int], val: list[int], longest: int, alphabet: int) -> list[float]:
    """Return the mean losses by the definition, with dictionaries."""
    def probability(context: tuple[int, ...], symbol: int) -> float:
        shorter = probability(context[1:], symbol) if context else 1 / alphabet
        n = len(context)
        after = Counter(train[i] for i in range(longest, len(train)) if tuple(train[i - n: i]) == context)
        if not after:
            return shorter
        return (after[symbol] + len(after) * shorter) / (sum(after.values()) + len(after))

    return [-float(np.mean([np.log(probability(tuple(val[i - n: i]), val[i])) for i in range(longest, len(val))]))
            for n in range(longest + 1)]


def test_losses_match_the_definition() -> None:
    random = np.random.default_rng(0)
    train, val = random.integers(0, 4, 300), random.integers(0, 5, 60)  # 4 is not in train
    expected = reference_losses(list(train), list(val), 3, 5)
    assert ngram.ngram_losses(train, val, 3, 5).mean(1) == pytest.approx(expected, rel=1e-12)
    assert ngram.ngram_losses(train, val, 3).mean(1) == pytest.approx(expected, rel=1e-12)


def test_noise_costs_its_entropy_and_a_loop_costs_nothing() -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 16, 50_000)
    assert ngram.ngram_losses(noise[:40_000], noise[40_000:], 1)[0].mean() == pytest.approx(np.log(16), abs=0.01)
    loop = np.tile(np.arange(10), 2_000)
    assert ngram.ngram_losses(loop[:15_000], loop[15_000:], 2)[-1].mean() < 0.01


def test_different_contexts_have_different_hashes() -> None:
    """Every pair of 500 symbols has its own hash."""
    a, b = np.meshgrid(np.arange(1, 501, dtype=np.uint64), np.arange(1, 501, dtype=np.uint64))
    zero = np.zeros(a.size, np.uint64)
    assert len(np.unique(ngram._mix(ngram._mix(zero, a.ravel()), b.ravel()))) == 250_000


def test_unknown_words_cost_their_spelling() -> None:
    """`to` and ` be` are known; ` or` occurs once, so it costs its three characters and its end."""
    train, val = "to be\nto be\nto be or", "to be or"
    ids = np.array([1, 2, 3, 1, 2, 3, 1, 2, 0])
    known_losses = ngram.ngram_losses(ids, np.array([1, 2, 0]), 0)[0].sum()
    spelling = np.arange(len(val)) * 1.0
    assert ngram.word_losses(train, val, spelling, 0) == [pytest.approx((known_losses + 5 + 6 + 7) / len(val))]
    val += "\n"
    known_losses += ngram.ngram_losses(ids, np.array([3]), 0)[0].sum()
    spelling = np.arange(len(val)) * 1.0
    assert ngram.word_losses(train, val, spelling, 0) == [pytest.approx((known_losses + 5 + 6 + 7 + 8) / len(val))]
