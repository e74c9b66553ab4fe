"""An n-gram model by counting, against the same one written out by hand."""

from collections import Counter

import numpy as np
import pytest

from bardlet.data import ngram


def by_hand(train: list[int], held: list[int], longest: int, alphabet: int) -> list[float]:
    """The definition, with dictionaries."""
    def probability(context: tuple[int, ...], symbol: int) -> float:
        shorter = probability(context[1:], symbol) if context else 1 / alphabet
        n = len(context)
        after = Counter(train[i] for i in range(longest, len(train)) if tuple(train[i - n: i]) == context)
        if not after:
            return shorter
        return (after[symbol] + len(after) * shorter) / (sum(after.values()) + len(after))

    return [-float(np.mean([np.log(probability(tuple(held[i - n: i]), held[i])) for i in range(longest, len(held))]))
            for n in range(longest + 1)]


def test_it_is_witten_and_bells_model() -> None:
    random = np.random.default_rng(0)
    train, held = random.integers(0, 4, 300), random.integers(0, 5, 60)  # the 4 was never seen
    assert ngram.ngram_losses(train, held, 3, 5).mean(1) == pytest.approx(by_hand(list(train), list(held), 3, 5), rel=1e-12)
    assert ngram.ngram_losses(train, held, 3).mean(1) == pytest.approx(by_hand(list(train), list(held), 3, 5), rel=1e-12)


def test_a_text_without_pattern_costs_its_entropy_and_a_loop_costs_nothing() -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 16, 50_000)
    assert ngram.ngram_losses(noise[:40_000], noise[40_000:], 1)[0].mean() == pytest.approx(np.log(16), abs=0.01)
    loop = np.tile(np.arange(10), 2_000)
    assert ngram.ngram_losses(loop[:15_000], loop[15_000:], 2)[-1].mean() < 0.01


def test_two_contexts_are_never_taken_for_one() -> None:
    """Every pair of 500 symbols has a number of its own."""
    a, b = np.meshgrid(np.arange(1, 501, dtype=np.uint64), np.arange(1, 501, dtype=np.uint64))
    zero = np.zeros(a.size, np.uint64)
    assert len(np.unique(ngram._mix(ngram._mix(zero, a.ravel()), b.ravel()))) == 250_000


def test_words_that_are_not_known_are_spelled() -> None:
    """`to` and ` be` are known, ` or` is seen once: counting by hand, what its three characters cost, and its end."""
    train, held = "to be\nto be\nto be or", "to be or"
    n = np.array([1, 2, 3, 1, 2, 3, 1, 2, 0])
    by_numbers = ngram.ngram_losses(n, np.array([1, 2, 0]), 0)[0].sum()
    spelling = np.arange(len(held)) * 1.0
    assert ngram.word_losses(train, held, spelling, 0) == [pytest.approx((by_numbers + 5 + 6 + 7) / len(held))]
    held += "\n"
    by_numbers += ngram.ngram_losses(n, np.array([3]), 0)[0].sum()
    spelling = np.arange(len(held)) * 1.0
    assert ngram.word_losses(train, held, spelling, 0) == [pytest.approx((by_numbers + 5 + 6 + 7 + 8) / len(held))]
