"""Conversations as rows of tokens: packed (several per row, block-diagonal attention), or one per row.

The lengths alone determine the packing. Each epoch shuffles conversations of equal length among their slots, and
shuffles the rows. So every epoch has the same number of batches and each conversation once, and the batch is a pure
function of (seed, step).

Shapes: B rows of a batch, T positions of a row. A conversation of n tokens takes n - 1 positions: all tokens but the
last are inputs, all but the first are targets.
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

from bardlet.data import shard_file, windows
from bardlet.data.batch import Batch
from bardlet.ops.cross_entropy import IGNORE

PARTS = ("train", "val")
ARRAYS = ("tokens", "answer", "ends")


@dataclass(frozen=True)
class TokenizedChats:
    """Conversations as tokens: number i is tokens[ends[i - 1]:ends[i]]; answer (bool) marks the completions.

    ends: int64, one for each conversation.
    """

    tokens: np.ndarray
    answer: np.ndarray
    ends: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of the first token of each conversation: int64."""
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    @staticmethod
    def of(rows: Sequence[tuple[np.ndarray, np.ndarray]], dtype: Any) -> TokenizedChats:
        """Concatenate the (ids, answer) that `chat_template.encode` returns for each; the tokens get `dtype`."""
        ids, answers = zip(*rows, strict=True)
        return TokenizedChats(np.concatenate(ids).astype(dtype), np.concatenate(answers),
                              np.cumsum([len(row) for row in ids]))

    def save(self, folder: Path, name: str) -> list[str]:
        """Write each array to a .npy file; return the file names."""
        files = {f"{name}.{array}.npy": getattr(self, array) for array in ARRAYS}
        for file, array in files.items():
            np.save(folder / file, array)
        return list(files)

    @staticmethod
    def load(folder: Path, name: str) -> TokenizedChats:
        """Memory-map the files that `save` wrote."""
        return TokenizedChats(*(shard_file.read_array(folder / f"{name}.{array}.npy") for array in ARRAYS))

    def part(self, span: slice) -> TokenizedChats:
        """Return the conversations of a slice without step."""
        starts, ends = self.starts[span], self.ends[span]
        if not len(starts):
            return TokenizedChats(self.tokens[:0], self.answer[:0], ends)
        tokens = slice(int(starts[0]), int(ends[-1]))
        return TokenizedChats(self.tokens[tokens], self.answer[tokens], ends - starts[0])


@dataclass(frozen=True)
class FittedRows:
    """The parts of conversations that fit into rows: of conversation indices[i] the first length[i] + 1 tokens.

    Numbers of conversations: cut lost their last messages; left_out have no completion that fits; unanswered have none.
    """

    indices: np.ndarray
    length: np.ndarray
    cut: int
    left_out: int
    unanswered: int


def fit_to_window(chats: TokenizedChats, longest: int) -> FittedRows:
    """Cut each conversation that needs more than `longest` positions after the last completion that fits."""
    length = chats.ends - chats.starts - 1
    if not chats.answer.any():
        return FittedRows(np.zeros(0, np.int64), length[:0], cut=0, left_out=0, unanswered=len(chats))
    # a completion ends where the next token is not part of it, or belongs to another conversation
    after = np.append(chats.answer[1:], False)
    after[chats.ends - 1] = False
    stops = np.flatnonzero(chats.answer & ~after)  # the last tokens of all completions, ascending
    limit = np.minimum(chats.ends, chats.starts + longest + 1)
    last = np.searchsorted(stops, limit) - 1  # for each conversation, the last completion that ends before its limit
    fits = (last >= 0) & (stops[np.maximum(last, 0)] > chats.starts)
    shortened = np.where(fits & (length > longest), stops[np.maximum(last, 0)] - chats.starts, length)
    indices = np.flatnonzero(fits)
    answered = np.concatenate(([0], np.cumsum(chats.answer)))
    unanswered = int((answered[chats.ends] == answered[chats.starts]).sum())
    cut, lost = int((fits & (length > longest)).sum()), int((~fits).sum())
    return FittedRows(indices, shortened[indices], cut, lost - unanswered, unanswered)


def pack(length: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, first position) of each item, both int64. `length` must descend.

    Each item goes into the fullest row that has room for it (best fit decreasing; Johnson 1973), which is as good as
    any rule that looks at each item once.
    """
    row, position = np.zeros(len(length), np.int64), np.zeros(len(length), np.int64)
    spaces: list[int] = []  # the free space of the rows, ascending, each value once
    rows_with: dict[int, list[int]] = {}
    rows = 0
    for i, needed in enumerate(length.tolist()):
        at = bisect_left(spaces, needed)
        if at == len(spaces):
            target, space, rows = rows, longest, rows + 1
        else:
            space = spaces[at]
            target = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[at], rows_with[space]
        row[i], position[i] = target, longest - space
        if space > needed:
            if space - needed not in rows_with:
                insort(spaces, space - needed)
            rows_with.setdefault(space - needed, []).append(target)
    return row, position


class ChatBatches:
    """Batches of rows of conversations, by step. An epoch has each conversation once."""

    def __init__(self, chats: TokenizedChats, block_size: int, rows: int, seed: int, pad: int, multiple: int = 1,
                 packed: bool = True) -> None:
        """Fit the conversations to `block_size` and assign them to rows.

        rows: per batch. pad: padding id. packed: several conversations per row.
        multiple: pad a smaller batch, the last of an epoch, to a multiple of this, with empty rows.
        """
        self.chats, self.block_size, self.rows = chats, block_size, rows
        self.seed, self.pad, self.multiple, self.packed = seed, pad, multiple, packed
        self.fitted = fit_to_window(chats, block_size)
        self.order = np.argsort(-self.fitted.length, kind="stable")
        self.length = self.fitted.length[self.order]  # of each slot, descending
        slots = len(self.length)
        alone = np.arange(slots), np.zeros(slots, np.int64)
        row, first = pack(self.length, block_size) if packed else alone
        self.first = first  # position of each slot in its row
        self.number_of_rows = int(row.max()) + 1 if slots else 0
        self.slots = np.split(np.argsort(row, kind="stable"), np.cumsum(np.bincount(row))[:-1]) if slots else []
        self.batches_per_epoch = -(-self.number_of_rows // rows)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (the order of the rows, the conversation of each slot) of an epoch, both int64."""
        if number not in self._epochs:
            random = np.random.default_rng([self.seed % 2**64, number])
            shuffled = random.permutation(len(self.order))
            chat = shuffled[np.argsort(-self.fitted.length[shuffled], kind="stable")]  # equal lengths trade places
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[number] = random.permutation(self.number_of_rows), self.fitted.indices[chat]
        return self._epochs[number]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        rows, chat = self.epoch(epoch)
        return self._batch(rows[within * self.rows : (within + 1) * self.rows], chat)

    def all(self) -> Iterator[Batch]:
        """Yield batches with every conversation once, always in the same order."""
        chat = self.fitted.indices[self.order]
        for first in range(0, self.number_of_rows, self.rows):
            yield self._batch(np.arange(first, min(first + self.rows, self.number_of_rows)), chat)

    def widest(self) -> Batch:
        """Return a batch as large as any can be, without padding."""
        ids = torch.zeros((self.rows, self.block_size), dtype=torch.int64)
        return {"idx": ids, "target": ids, **({"segment": ids} if self.packed else {})}

    def _batch(self, rows: np.ndarray, chat: np.ndarray) -> Batch:
        """Return `idx` (B, T) and `target` (B, T), int64, IGNORE at tokens not to learn.

        Packed rows add `segment` (B, T) int64: the number of a token's conversation in its row, from 1; 0 is padding.
        """
        B = len(rows) + -len(rows) % self.multiple
        widest = max(int(self.length[self.slots[row][0]]) for row in rows)
        T = self.block_size if self.packed else min(self.block_size, -(-widest // 16) * 16)
        idx = np.full((B, T), self.pad, np.int64)
        target, segment = np.full((B, T), IGNORE, np.int64), np.zeros((B, T), np.int64)
        for b, row in enumerate(rows):
            for number, slot in enumerate(self.slots[row], 1):
                first, n = int(self.chats.starts[chat[slot]]), int(self.length[slot])
                span = slice(int(self.first[slot]), int(self.first[slot]) + n)
                ids = self.chats.tokens[first : first + n + 1].astype(np.int64)  # uint16 could not hold IGNORE
                idx[b, span] = ids[:-1]
                target[b, span] = np.where(self.chats.answer[first + 1 : first + n + 1], ids[1:], IGNORE)
                segment[b, span] = number
        arrays = {"idx": idx, "target": target, **({"segment": segment} if self.packed else {})}
        return {name: torch.from_numpy(x) for name, x in arrays.items()}

    def describe_batch(self, step: int) -> str:
        """Return the epoch and batch of a step, for messages."""
        return windows.epoch_and_batch(step, self.batches_per_epoch)
