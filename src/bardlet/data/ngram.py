"""N-gram losses: how hard a text is to predict, by counting alone, in a second and without training.

The lecture's bigram predicts the next character from the last one. An n-gram model uses several, and backs off to
fewer for a context that it has never seen.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

MIX = np.uint64(0xBF58476D1CE4E5B9)
"""An odd multiplier that spreads bits well (Steele et al., 2014: SplitMix)."""
SYMBOL_BITS = np.uint64(22)
"""Bits of a 64-bit key that hold a symbol; the others hold a hash of its context."""


def ngram_losses(train: np.ndarray, val: np.ndarray, longest: int = 5, alphabet: int | None = None) -> np.ndarray:
    """Return -log p of each validation symbol, by n-gram models with 0, 1, ... `longest` symbols of context.

    The probability after a context interpolates its counts with the model of one symbol less, weighted by the number
    of different symbols that followed the context (Witten and Bell, 1991, method C):
    p(x | ctx) = (count(ctx x) + kinds(ctx) p(x | shorter ctx)) / (count(ctx) + kinds(ctx)).

    Args:
        train, val: (N,), (M,) integers from 0 to 2^22 - 2; ValueError unless both have more than `longest`.
        alphabet: number of different symbols; None: those in `train`, and one for all others.

    Returns:
        (longest + 1, M - longest) nats; the first `longest` symbols of `val` are context only.
    """
    if min(len(train), len(val)) <= longest:
        raise ValueError(f"{len(train)} and {len(val)} symbols are too few for contexts of {longest}")
    train, val = train.astype(np.uint64) + np.uint64(1), val.astype(np.uint64) + np.uint64(1)
    next_train, next_val = train[longest:], val[longest:]
    context_train, context_val = np.zeros_like(next_train), np.zeros_like(next_val)
    probability = np.full(len(next_val), 1 / (alphabet or len(np.unique(train)) + 1))
    losses = []
    for order in range(longest + 1):
        if order:  # extend the context by one symbol further back
            context_train = _mix(context_train, train[longest - order: -order])
            context_val = _mix(context_val, val[longest - order: -order])
        keys, first = _first_of_runs(np.sort(_keys(context_train, next_train)))
        counts = np.diff(first, append=len(next_train))
        contexts, first = _first_of_runs(keys >> SYMBOL_BITS)
        kinds, total = np.diff(first, append=len(keys)), np.add.reduceat(counts, first)
        wanted = _keys(context_val, next_val)
        context, gram = _look_up(contexts, wanted >> SYMBOL_BITS), _look_up(keys, wanted)
        count, kinds, total = np.where(gram >= 0, counts[gram], 0), kinds[context], total[context]
        mixed = (count + kinds * probability) / (total + kinds)
        probability = np.where(context >= 0, mixed, probability)
        losses.append(-np.log(probability))
    return np.stack(losses)


WORD = re.compile(r" ?\w+|[\s\S]")
"""A word with the space before it, or any other character."""


def word_losses(train: str, val: str, spelling: np.ndarray, longest: int = 2) -> list[float]:
    """Return the losses, in nats per character, of n-gram models with 0, 1, ... `longest` whole words of context.

    All words that occur less than twice in `train` share one symbol, plus the cost of spelling them and their end.

    Args:
        spelling: (len(val),) nats of each character, by a character model.
    """
    train_words, val_words = WORD.findall(train), WORD.findall(val)
    ids = {word: n for n, (word, count) in enumerate(Counter(train_words).items(), 1) if count > 1}
    val_ids = np.array([ids.get(word, 0) for word in val_words])
    spelled = np.repeat(val_ids == 0, [len(word) for word in val_words])
    spelled[1:] |= spelled[:-1]  # the character after a spelled word marks its end
    losses = ngram_losses(np.array([ids.get(word, 0) for word in train_words]), val_ids, longest).mean(1)
    return [float(loss * len(val_words) / len(val) + (spelling * spelled).mean()) for loss in losses]


def _mix(state: np.ndarray, symbol: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of the sequence that `state` hashes, followed by `symbol`; collisions are negligible."""
    h = (state * np.uint64(31) + symbol) * MIX
    h = (h ^ (h >> np.uint64(29))) * MIX
    return h ^ (h >> np.uint64(32))


def _keys(contexts: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """Return a number for each context and the symbol after it; sorted, the keys of a context are together.

    42 bits of the context's hash are left: among 500,000 contexts two collide once in 35 texts, which changes nothing
    that can be seen.
    """
    return contexts >> SYMBOL_BITS << SYMBOL_BITS | symbols


def _first_of_runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values of a sorted array and where each begins."""
    first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return values[first], first


def _look_up(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the index of each of `queries` in the sorted `keys`, -1 if it is not there."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, index, -1)
