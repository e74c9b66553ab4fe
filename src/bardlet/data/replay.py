"""Batches of two texts: a new one, and a share of rows from an old one, so that a model does not forget it."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from bardlet.data.batch import Batch
from bardlet.data.windows import Windows


class Mixture:
    """Training batches whose first rows are windows of the new text, and whose last rows are windows of the old one.

    The number of old rows alternates between the two whole numbers beside share * batch_size, so that after every step
    the share of all rows so far is as close as whole rows permit. Both texts are read in the order of their `Windows`.
    """

    def __init__(self, new: Windows, old: Windows, share: float) -> None:
        """share: the old text's share of the rows, at least 0 and below 1."""
        self.new, self.old = new, old
        self.old_rows_per_step = Fraction(str(share)) * new.batch_size  # exact: 0.29 of 100 rows are 29

    def rows(self, step: int) -> tuple[slice, slice]:
        """Return the windows of the new and of the old text in the batch of a step, counted from the start of the run.
        """
        first, last = (math.floor(self.old_rows_per_step * n) for n in (step, step + 1))
        size = self.new.batch_size
        return slice(step * size - first, (step + 1) * size - last), slice(first, last)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0; a pure function of (seed, step)."""
        parts = [windows.batch_at(rows.start, rows.stop)
                 for windows, rows in zip((self.new, self.old), self.rows(step), strict=True) if rows.stop > rows.start]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def describe_batch(self, step: int) -> str:
        """Return the epochs and windows of a step, for messages."""
        parts = zip(("", "replayed "), (self.new, self.old), self.rows(step), strict=True)
        return ", and ".join(f"{which}{windows.describe(rows.start, rows.stop)}" for which, windows, rows in parts
                             if rows.stop > rows.start)
