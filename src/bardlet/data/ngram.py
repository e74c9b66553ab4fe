"""What counting alone can say about a text: the loss of an n-gram model, in a second and without training.

The bigram of the lecture looks at one character to guess the next. An n-gram model looks at several, and falls back on
fewer where it has never seen them. Its loss tells how hard a text is before a network is trained on it.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

MIX = np.uint64(0xBF58476D1CE4E5B9)
"""An odd multiplier that spreads bits well (Steele et al., 2014: SplitMix)."""


def ngram_losses(train: np.ndarray, held: np.ndarray, longest: int = 5, alphabet: int | None = None) -> np.ndarray:
    """-log p of each held-out symbol, by n-gram models that look at 0, 1, ... `longest` symbols before it.

    The probability after a context is mixed from the counts there and the model of one symbol less, by how many
    different symbols the context was followed by (Witten and Bell, 1991, method C):
    p(x | ctx) = (count(ctx x) + kinds(ctx) p(x | shorter ctx)) / (count(ctx) + kinds(ctx)).

    Args:
        train, held: (N,), (M,) whole numbers; ValueError where there are not more than `longest` of each.
        alphabet: how many different symbols there are; None: as many as `train` has, and one for all others.

    Returns:
        (longest + 1, M - longest) nats; the first `longest` symbols of `held` are context alone.
    """
    if min(len(train), len(held)) <= longest:
        raise ValueError(f"{len(train)} and {len(held)} symbols are too few for contexts of {longest}")
    train, held = train.astype(np.uint64) + np.uint64(1), held.astype(np.uint64) + np.uint64(1)
    next_train, next_held = train[longest:], held[longest:]
    context_train, context_held = np.zeros_like(next_train), np.zeros_like(next_held)
    probability = np.full(len(next_held), 1 / (alphabet or len(np.unique(train)) + 1))
    found = []
    for order in range(longest + 1):
        if order:  # one symbol further back joins the context
            context_train = _mix(context_train, train[longest - order: -order])
            context_held = _mix(context_held, held[longest - order: -order])
        grams, where, counts = np.unique(_mix(context_train, next_train), return_index=True, return_counts=True)
        contexts, context_of = np.unique(context_train[where], return_inverse=True)
        here = _look_up(contexts, context_held)
        total = np.bincount(context_of, weights=counts)[here]
        kinds = np.bincount(context_of)[here]
        gram = _look_up(grams, _mix(context_held, next_held))
        count = np.where(gram >= 0, counts[gram], 0)
        mixed = (count + kinds * probability) / (total + kinds)
        probability = np.where(here >= 0, mixed, probability)
        found.append(-np.log(probability))
    return np.stack(found)


WORD = re.compile(r" ?\w+|[\s\S]")
"""A word with the space before it, or any other character."""


def word_losses(train: str, held: str, spelling: np.ndarray, longest: int = 2) -> list[float]:
    """Loss, in nats per character, of n-gram models that look at 0, 1, ... `longest` whole words.

    Words that `train` has less than twice are one symbol, and each costs its letters on top, and its end.

    Args:
        spelling: (len(held),) nats of each character, by a model of characters.
    """
    learned, read = WORD.findall(train), WORD.findall(held)
    number = {word: n for n, (word, count) in enumerate(Counter(learned).items(), 1) if count > 1}
    known = np.array([number.get(word, 0) for word in read])
    letters = np.repeat(known == 0, [len(word) for word in read])
    letters[1:] |= letters[:-1]  # where it ends has to be said, too
    of_words = ngram_losses(np.array([number.get(word, 0) for word in learned]), known, longest).mean(1)
    return [float(loss * len(read) / len(held) + (spelling * letters).mean()) for loss in of_words]


def _mix(state: np.ndarray, symbol: np.ndarray) -> np.ndarray:
    """A 64-bit number for (what `state` stands for, then `symbol`); two of them are alike by chance once in ages."""
    h = (state * np.uint64(31) + symbol) * MIX
    h = (h ^ (h >> np.uint64(29))) * MIX
    return h ^ (h >> np.uint64(32))


def _look_up(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of `wanted` stands in the sorted `keys`; -1 where it does not."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)
