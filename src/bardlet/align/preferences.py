"""Preferences as tokens and as batches: two answers to the same question beside each other.

B pairs of a batch, 2 answers of a pair, the chosen one first, T positions. A conversation of n tokens takes n - 1
positions: each but the last is read, each but the first is predicted. The loss knows the answers alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bardlet import data, files
from bardlet.align import chat
from bardlet.align.packing import PARTS, Chats
from bardlet.corpus import cache_folder
from bardlet.data import Progress
from bardlet.dist import Dist
from bardlet.examples import Examples, Preference
from bardlet.loss import IGNORE, Batch
from bardlet.tokenizer import Tokenizer

VERSION = 2
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pairs:
    """Number i of both are the two answers to the same question, with the question in front."""

    chosen: Chats
    rejected: Chats

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sides(self) -> tuple[Chats, Chats]:
        """(chosen, rejected)"""
        return self.chosen, self.rejected

    def part(self, which: slice) -> Pairs:
        """The pairs of a slice without step."""
        return Pairs(self.chosen.part(which), self.rejected.part(which))

    def positions(self) -> np.ndarray:
        """How many positions the longer answer of each takes, with its question: int64."""
        return np.maximum(*(side.ends - side.starts - 1 for side in self.sides))


@dataclass(frozen=True)
class PreparedPairs:
    """Preferences as tokens; no prompt is in both parts."""

    train: Pairs
    val: Pairs
    tokenizer: Tokenizer


def prepare(found: Examples, words: Tokenizer, dist: Dist, progress: Progress | None = None) -> PreparedPairs:
    """The preferences as tokens, by a tokenizer; rank 0 makes them, the others read what it made."""
    key = hashlib.sha256(f"{found.hash} {words.hash} {chat.TEMPLATE} {VERSION}".encode()).hexdigest()
    folder = cache_folder() / "tokens" / f"{found.name[:60]}-pairs-{key[:16]}"
    with dist.main_first():
        return data.cached(folder, lambda whole: _build(found, words, whole, progress), lambda made: _open(made, words))


def _build(found: Examples, words: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Writes the arrays of both parts and sides into an empty folder."""
    names: list[str] = []
    for part, preferences in zip(PARTS, found.preferences(), strict=True):
        if progress:
            progress(f"tokens, {part}", 0, len(preferences))
        for side in SIDES:
            names += encoded(words, preferences, side).save(folder, f"{part}.{side}")
    files.seal(folder, names)


def encoded(words: Tokenizer, preferences: Sequence[Preference], side: str) -> Chats:
    """The chosen or the rejected answers, each behind its question."""
    marks, rows = chat.marks_of(words), []
    for one in preferences:
        last = {"role": "assistant", "content": getattr(one, side)}
        ids, answer = chat.encode(words, [*one.prompt, last], marks=marks)
        begins = len(answer) - int(answer[::-1].argmin())  # answers before the last do not count
        rows.append((ids, np.arange(len(ids)) >= begins))
    return Chats.of(rows, words.dtype)


def _open(folder: Path, words: Tokenizer) -> PreparedPairs:
    data.check(folder)

    train, val = (Pairs(*(Chats.load(folder, f"{part}.{side}") for side in SIDES)) for part in PARTS)
    return PreparedPairs(train, val, words)


class PairBatches:
    """Batches of pairs in random order, by step. An epoch has each pair once whose answers both fit."""

    def __init__(self, pairs: Pairs, block_size: int, rows: int, seed: int, pad: int, multiple: int = 1) -> None:
        """rows: pairs of a batch. multiple: the last one of an epoch is filled up to it, with pairs without targets."""
        self.pairs, self.block_size, self.rows = pairs, block_size, rows
        self.seed, self.pad, self.multiple = seed, pad, multiple
        self.kept = np.flatnonzero(pairs.positions() <= block_size)
        self.left_out = len(pairs) - len(self.kept)
        self.batches_per_epoch = -(-len(self.kept) // rows)

    def batch(self, step: int) -> Batch:
        """The batch of a step from 0 on, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed % 2**64, epoch]).permutation(self.kept)
        return self.of(order[within * self.rows : (within + 1) * self.rows])

    def all(self) -> list[np.ndarray]:
        """The pairs once, those of similar lengths together: the numbers of each batch."""
        order = self.kept[np.argsort(self.pairs.positions()[self.kept], kind="stable")]
        return [order[first : first + self.rows] for first in range(0, len(order), self.rows)]

    def of(self, which: np.ndarray) -> Batch:
        """The pairs `which`: `idx`, `target` (B, 2, T) int64, IGNORE outside the answers, and `number` (B,) int64."""
        B = len(which) + -len(which) % self.multiple
        T = min(self.block_size, -(-int(self.pairs.positions()[which].max()) // 16) * 16)
        idx, target = np.full((B, 2, T), self.pad, np.int64), np.full((B, 2, T), IGNORE, np.int64)
        for b, i in enumerate(which):
            for s, side in enumerate(self.pairs.sides):
                here = slice(int(side.starts[i]), int(side.ends[i]))
                ids, answer = side.tokens[here].astype(np.int64), side.answer[here]
                idx[b, s, : len(ids) - 1] = ids[:-1]
                target[b, s, : len(ids) - 1] = np.where(answer[1:], ids[1:], IGNORE)
        number = np.concatenate((which, np.repeat(which[:1], B - len(which)))).astype(np.int64)
        return {"idx": torch.from_numpy(idx), "target": torch.from_numpy(target), "number": torch.from_numpy(number)}

    def widest(self) -> Batch:
        """A batch as large as any could be."""
        ids = torch.zeros((self.rows, 2, self.block_size), dtype=torch.int64)
        return {"idx": ids, "target": ids, "number": torch.zeros(self.rows, dtype=torch.int64)}

    def place(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        return data.place_of_batch(step, self.batches_per_epoch)
