"""Windows of a token stream: the batch of a step as a pure function of (seed, step), and validation windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from bardlet.data.batch import Batch
from bardlet.errors import BardletError


class Windows:
    """Training batches. An epoch is a tiling of the text into windows, each once, in random order.

    The tiling starts at a random offset in [0, T), a new one each epoch, so that over the epochs each token is
    predicted from contexts of every length. (N - T) // T windows fit whatever the offset.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int) -> None:
        """tokens: (N,) ids. BardletError if N < 2 * block_size."""
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        self.windows_per_epoch = (len(tokens) - block_size) // block_size
        if self.windows_per_epoch < 1:
            raise BardletError(
                f"the training split has {len(tokens):,} tokens, too few for windows of {block_size}; "
                f"use --block-size {max(len(tokens) // 2, 1)} or less, or a longer text"
            )
        self._epochs: dict[int, tuple[np.ndarray, int]] = {}

    def starts(self, epoch: int) -> np.ndarray:
        """Return the starts of the windows of an epoch, in order: (windows_per_epoch,) int64."""
        order, offset = self._order(epoch)
        return offset + order.astype(np.int64) * self.block_size

    def _order(self, epoch: int) -> tuple[np.ndarray, int]:
        """Return (windows of an epoch in random order, start of the first window)."""
        if epoch not in self._epochs:
            random = np.random.default_rng([self.seed % 2**64, epoch])
            offset = int(random.integers(self.block_size))
            order = np.arange(self.windows_per_epoch, dtype=np.uint32 if self.windows_per_epoch < 2**32 else np.int64)
            random.shuffle(order)  # the order of random.permutation, in half the memory
            if len(self._epochs) > 1:  # keep two: a batch can span two epochs
                self._epochs.clear()
            self._epochs[epoch] = order, offset
        return self._epochs[epoch]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0; a pure function of (seed, step).

        `idx` and `target` (B, T), int64 on the CPU; `target` is `idx` one token later.
        """
        return self.batch_at(step * self.batch_size, (step + 1) * self.batch_size)

    def batch_at(self, first: int, last: int) -> Batch:
        """Return the windows from `first` up to `last`, counted over all epochs."""
        positions = np.arange(first, last)
        epochs, within = np.divmod(positions, self.windows_per_epoch)
        starts = []
        for epoch in np.unique(epochs):
            order, offset = self._order(int(epoch))
            starts.append(offset + order[within[epochs == epoch]].astype(np.int64) * self.block_size)
        return _windows_at(self.tokens, np.concatenate(starts), self.block_size)

    def describe_batch(self, step: int) -> str:
        """Return the epoch and windows of a step, for messages."""
        return self.describe(step * self.batch_size, (step + 1) * self.batch_size)

    def describe(self, first: int, last: int) -> str:
        """Return the epoch and windows from `first` up to `last`, for messages."""
        (epoch, start), (later, end) = (divmod(i, self.windows_per_epoch) for i in (first, last - 1))
        until = f"{end + 1}" if later == epoch else f"{end + 1} of epoch {later + 1}"
        return f"epoch {epoch + 1}, windows {start + 1} to {until} ({self.windows_per_epoch:,} per epoch)"


def epoch_and_batch(step: int, batches_per_epoch: int) -> str:
    """Return the epoch and batch of a step, for messages, if every epoch has a whole number of batches."""
    epoch, within = divmod(step, batches_per_epoch)
    return f"epoch {epoch + 1}, batch {within + 1} of {batches_per_epoch:,}"


@dataclass(frozen=True)
class _Tiling(Sequence[Batch]):
    """Batches of windows that are read when they are used. last: (start, length) of a shorter window, or None."""

    tokens: np.ndarray
    starts: range
    block_size: int
    batch_size: int
    last: tuple[int, int] | None

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size) + (self.last is not None)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        starts = self.starts[index * self.batch_size : (index + 1) * self.batch_size]
        if starts:
            return _windows_at(self.tokens, np.array(starts), self.block_size)
        start, length = self.last or (0, 0)
        return _windows_at(self.tokens, np.array([start]), length)


def validation_windows(tokens: np.ndarray, block_size: int, batch_size: int = 64, every: int = 1) -> Sequence[Batch]:
    """Return batches for protocol (b), like those of `Windows`: every token but the first is a target once.

    Windows of block_size with stride block_size, no context carried over; the remainder is a shorter window in a
    batch of its own. `every` k takes only every k-th window. BardletError if there are fewer than 2 tokens.
    """
    _at_least(tokens, 2)
    whole, rest = divmod(len(tokens) - 1, block_size)
    starts = range(0, whole * block_size, every * block_size)
    last = (whole * block_size, rest) if rest and whole % every == 0 else None
    return _Tiling(tokens, starts, block_size, batch_size, last)


def random_windows(
    tokens: np.ndarray, block_size: int, n_batches: int = 200, batch_size: int = 64, seed: int = 0
) -> list[Batch]:
    """Return batches for protocol (a), nanoGPT's, like those of `Windows`: windows at random positions.

    Uses a generator of its own, so it changes no other random numbers. BardletError unless there are more than
    block_size tokens.
    """
    _at_least(tokens, block_size + 1)
    random = np.random.default_rng(seed)
    starts = random.integers(len(tokens) - block_size, size=(n_batches, batch_size))
    return [_windows_at(tokens, row, block_size) for row in starts]


def _at_least(tokens: np.ndarray, needed: int) -> None:
    if len(tokens) < needed:
        raise BardletError(
            f"the validation split has {len(tokens):,} tokens but needs {needed:,}; "
            f"use a longer text, or --block-size {max(len(tokens) - 1, 1)} or less"
        )


def _windows_at(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Return the windows that begin at starts (B,)."""
    chunk = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))  # (B, T + 1)
    return {"idx": chunk[:, :-1].contiguous(), "target": chunk[:, 1:].contiguous()}
