"""Windows of a token stream: the batch of a step as a pure function of (seed, step), and validation windows."""

from __future__ import annotations

import numpy as np
import torch

from bardlet.data.batch import Batch
from bardlet.errors import BardletError


class Windows:
    """Training batches. An epoch is every window of a tiling of the text once, in random order.

    The tiling begins at a random offset in [0, T), other in each epoch, so that over the epochs a token is
    predicted from contexts of every length. (N - T) // T windows fit whatever the offset.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int) -> None:
        """tokens: (N,) ids. BardletError when N < 2 * block_size."""
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        self.windows_per_epoch = (len(tokens) - block_size) // block_size
        if self.windows_per_epoch < 1:
            raise BardletError(
                f"the training part has {len(tokens):,} tokens, too few for windows of {block_size}: "
                f"use --block-size {max(len(tokens) // 2, 1)} or less, or a longer text"
            )
        self._epochs: dict[int, np.ndarray] = {}

    def starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in their order; int64 of shape (windows_per_epoch,)."""
        if epoch not in self._epochs:
            random = np.random.default_rng([self.seed % 2**64, epoch])
            offset = random.integers(self.block_size)
            order = random.permutation(self.windows_per_epoch)
            if len(self._epochs) > 1:  # a batch can lie across two epochs; no more is kept
                self._epochs.clear()
            self._epochs[epoch] = offset + order * self.block_size
        return self._epochs[epoch]

    def batch(self, step: int) -> Batch:
        """`idx` and `target` (B, T) of a step from 0 on, int64 on the CPU; a pure function of (seed, step).

        `target` is `idx` one token later.
        """
        first = step * self.batch_size
        places = np.arange(first, first + self.batch_size)
        epochs, within = np.divmod(places, self.windows_per_epoch)
        starts = np.concatenate([self.starts(int(e))[within[epochs == e]] for e in np.unique(epochs)])
        return _windows_at(self.tokens, starts, self.block_size)

    def describe_batch(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        first = step * self.batch_size
        (epoch, start), (later, end) = (divmod(i, self.windows_per_epoch) for i in (first, first + self.batch_size - 1))
        until = f"{end + 1}" if later == epoch else f"{end + 1} of epoch {later + 1}"
        return f"windows {start + 1} to {until}, of {self.windows_per_epoch:,}, in epoch {epoch + 1}"


def epoch_and_batch(step: int, batches_per_epoch: int) -> str:
    """Where the batch of a step lies, in words, where an epoch has whole batches."""
    epoch, within = divmod(step, batches_per_epoch)
    return f"batch {within + 1} of {batches_per_epoch:,}, in epoch {epoch + 1}"


def validation_windows(tokens: np.ndarray, block_size: int, batch_size: int = 64, every: int = 1) -> list[Batch]:
    """Protocol (b): every token but the first is a target once: batches as of `Windows`.

    Windows of block_size with stride block_size, no context carried over; the rest is a shorter window in a
    batch of its own. `every` k takes every k-th window only. BardletError when there are fewer than 2 tokens.
    """
    _at_least(tokens, 2)
    whole, rest = divmod(len(tokens) - 1, block_size)
    starts = np.arange(0, whole, every) * block_size
    batches = [_windows_at(tokens, starts[i : i + batch_size], block_size) for i in range(0, len(starts), batch_size)]
    if rest and whole % every == 0:
        batches.append(_windows_at(tokens, np.array([whole * block_size]), rest))
    return batches


def random_windows(
    tokens: np.ndarray, block_size: int, n_batches: int = 200, batch_size: int = 64, seed: int = 0
) -> list[Batch]:
    """Protocol (a), nanoGPT's: batches of windows that begin anywhere, as of `Windows`.

    Its own generator: nothing else is disturbed. BardletError when there are block_size tokens or fewer.
    """
    _at_least(tokens, block_size + 1)
    random = np.random.default_rng(seed)
    starts = random.integers(len(tokens) - block_size, size=(n_batches, batch_size))
    return [_windows_at(tokens, row, block_size) for row in starts]


def _at_least(tokens: np.ndarray, needed: int) -> None:
    if len(tokens) < needed:
        raise BardletError(
            f"the validation part has {len(tokens):,} tokens and {needed:,} are needed: "
            f"use a longer text, or --block-size {max(len(tokens) - 1, 1)} or less"
        )


def _windows_at(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """The windows that begin at starts (B,)."""
    chunk = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))  # (B, T + 1)
    return {"idx": chunk[:, :-1].contiguous(), "target": chunk[:, 1:].contiguous()}
