"""Conversations as rows of tokens: several in a row, none of which sees another, or each in a row of its own.

What is packed is fixed by the lengths alone: each epoch puts other conversations of the same lengths into the same
places, and has the rows in another order. So an epoch has as many batches as any other, each conversation once, and
which it has at a step is a function of seed and step.

B rows of a batch, T positions of a row. A conversation of n tokens takes n - 1 positions: each but the last is read,
each but the first is predicted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet.data import shards, windows
from bardlet.data.batch import Batch
from bardlet.ops.cross_entropy import IGNORE

PARTS = ("train", "val")
ARRAYS = ("tokens", "answer", "ends")


@dataclass(frozen=True)
class TokenizedChats:
    """Conversations as tokens: number i is tokens[ends[i - 1]:ends[i]]; answer (boolean) says which are to be learned.

    ends: int64, one for each conversation.
    """

    tokens: np.ndarray
    answer: np.ndarray
    ends: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each begins: int64."""
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    @staticmethod
    def of(rows: Sequence[tuple[np.ndarray, np.ndarray]], dtype: Any) -> TokenizedChats:
        """From (ids, answer) of each, as `chat_template.encode` gives them; the tokens get `dtype`."""
        ids, answers = zip(*rows, strict=True)
        return TokenizedChats(np.concatenate(ids).astype(dtype), np.concatenate(answers), np.cumsum([len(row) for row in ids]))

    def save(self, folder: Path, name: str) -> list[str]:
        """A file of numpy's for each array; returns their names."""
        made = {f"{name}.{array}.npy": getattr(self, array) for array in ARRAYS}
        for file, array in made.items():
            np.save(folder / file, array)
        return list(made)

    @staticmethod
    def load(folder: Path, name: str) -> TokenizedChats:
        """What `save` wrote, memory-mapped."""
        return TokenizedChats(*(shards.read_array(folder / f"{name}.{array}.npy") for array in ARRAYS))

    def part(self, which: slice) -> TokenizedChats:
        """The conversations of a slice without step."""
        begins, ends = self.starts[which], self.ends[which]
        if not len(begins):
            return TokenizedChats(self.tokens[:0], self.answer[:0], ends)
        span = slice(int(begins[0]), int(ends[-1]))
        return TokenizedChats(self.tokens[span], self.answer[span], ends - begins[0])


@dataclass(frozen=True)
class FittedRows:
    """What of conversations goes into rows of a length: number which[i], its first length[i] + 1 tokens.

    cut: how many lost their last messages; left_out: of how many no answer fits; unanswered: how many have none.
    """

    which: np.ndarray
    length: np.ndarray
    cut: int
    left_out: int
    unanswered: int


def fit_to_window(chats: TokenizedChats, longest: int) -> FittedRows:
    """Cut the conversations that need more than `longest` positions behind their last answer that fits."""
    length = chats.ends - chats.starts - 1
    if not chats.answer.any():
        return FittedRows(np.zeros(0, np.int64), length[:0], cut=0, left_out=0, unanswered=len(chats))
    # an answer ends where the next token is none of it; conversations end there, too
    after = np.append(chats.answer[1:], False)
    after[chats.ends - 1] = False
    stops = np.flatnonzero(chats.answer & ~after)  # the last tokens of all answers, ascending
    room = np.minimum(chats.ends, chats.starts + longest + 1)
    last = np.searchsorted(stops, room) - 1  # of each conversation the last answer that ends before there is no room
    fits = (last >= 0) & (stops[np.maximum(last, 0)] > chats.starts)
    short = np.where(fits & (length > longest), stops[np.maximum(last, 0)] - chats.starts, length)
    which = np.flatnonzero(fits)
    before = np.concatenate(([0], np.cumsum(chats.answer)))
    unanswered = int((before[chats.ends] == before[chats.starts]).sum())
    cut, lost = int((fits & (length > longest)).sum()), int((~fits).sum())
    return FittedRows(which, short[which], cut, lost - unanswered, unanswered)


def pack(length: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Where things of these lengths, which descend, go: (row, first position) of each, both int64.

    Each goes into the fullest row that has room for it (best fit decreasing; Johnson 1973): as good as any rule that
    looks at them once.
    """
    row, place = np.zeros(len(length), np.int64), np.zeros(len(length), np.int64)
    rooms: list[int] = []  # those that rows have left, ascending, each once
    rows_with: dict[int, list[int]] = {}
    rows = 0
    for i, needed in enumerate(length.tolist()):
        at = bisect_left(rooms, needed)
        if at == len(rooms):
            mine, room, rows = rows, longest, rows + 1
        else:
            room = rooms[at]
            mine = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at], rows_with[room]
        row[i], place[i] = mine, longest - room
        if room > needed:
            if room - needed not in rows_with:
                insort(rooms, room - needed)
            rows_with.setdefault(room - needed, []).append(mine)
    return row, place


class ChatBatches:
    """Batches of rows of conversations, by step. An epoch has each conversation once."""

    def __init__(self, chats: TokenizedChats, block_size: int, rows: int, seed: int, pad: int, multiple: int = 1,
                 packed: bool = True) -> None:
        """rows: of a batch. pad: the id that fills a row up. packed: several conversations in a row.

        multiple: a batch that has fewer rows, the last of an epoch, is filled up to a multiple of it, with empty ones.
        """
        self.chats, self.block_size, self.rows = chats, block_size, rows
        self.seed, self.pad, self.multiple, self.packed = seed, pad, multiple, packed
        self.fitted = fit_to_window(chats, block_size)
        self.order = np.argsort(-self.fitted.length, kind="stable")
        self.length = self.fitted.length[self.order]  # of each slot; they descend
        slots = len(self.length)
        alone = np.arange(slots), np.zeros(slots, np.int64)
        row, first = pack(self.length, block_size) if packed else alone
        self.first = first  # position of each slot in its row
        self.number_of_rows = int(row.max()) + 1 if slots else 0
        self.slots = np.split(np.argsort(row, kind="stable"), np.cumsum(np.bincount(row))[:-1]) if slots else []
        self.batches_per_epoch = -(-self.number_of_rows // rows)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows in their order, the conversation of each slot), both int64."""
        if number not in self._epochs:
            random = np.random.default_rng([self.seed % 2**64, number])
            mixed = random.permutation(len(self.order))
            chat = mixed[np.argsort(-self.fitted.length[mixed], kind="stable")]  # equal lengths change their places
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[number] = random.permutation(self.number_of_rows), self.fitted.which[chat]
        return self._epochs[number]

    def batch(self, step: int) -> Batch:
        """The batch of a step from 0 on, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        rows, chat = self.epoch(epoch)
        return self._batch(rows[within * self.rows : (within + 1) * self.rows], chat)

    def all(self) -> Iterator[Batch]:
        """Every conversation once, always in the same order."""
        chat = self.fitted.which[self.order]
        for first in range(0, self.number_of_rows, self.rows):
            yield self._batch(np.arange(first, min(first + self.rows, self.number_of_rows)), chat)

    def widest(self) -> Batch:
        """A batch as large as any could be: a token in every place."""
        ids = torch.zeros((self.rows, self.block_size), dtype=torch.int64)
        return {"idx": ids, "target": ids, **({"segment": ids} if self.packed else {})}

    def _batch(self, rows: np.ndarray, chat: np.ndarray) -> Batch:
        """`idx` (B, T) int64, `target` (B, T) int64 with IGNORE where nothing is learned, and where rows are packed
        `segment` (B, T) int64: which conversation of its row a token is of, from 1 on, 0 for padding."""
        B = len(rows) + -len(rows) % self.multiple
        widest = max(int(self.length[self.slots[row][0]]) for row in rows)
        T = self.block_size if self.packed else min(self.block_size, -(-widest // 16) * 16)
        idx = np.full((B, T), self.pad, np.int64)
        target, segment = np.full((B, T), IGNORE, np.int64), np.zeros((B, T), np.int64)
        for b, row in enumerate(rows):
            for number, slot in enumerate(self.slots[row], 1):
                first, n = int(self.chats.starts[chat[slot]]), int(self.length[slot])
                here = slice(int(self.first[slot]), int(self.first[slot]) + n)
                ids = self.chats.tokens[first : first + n + 1].astype(np.int64)  # uint16 could not hold IGNORE
                idx[b, here] = ids[:-1]
                target[b, here] = np.where(self.chats.answer[first + 1 : first + n + 1], ids[1:], IGNORE)
                segment[b, here] = number
        made = {"idx": idx, "target": target, **({"segment": segment} if self.packed else {})}
        return {name: torch.from_numpy(x) for name, x in made.items()}

    def describe_batch(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        return windows.epoch_and_batch(step, self.batches_per_epoch)
