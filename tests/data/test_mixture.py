"""Mixed batches of a new and an old text: exact shares, order of the windows, a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bardlet.data.replay import Mixture
from bardlet.data.windows import Windows
from bardlet.runtime.distributed import Dist
from bardlet.training.step import micro_batches

OLD = 1_000
"""Tokens of the old text are at least this, those of the new one below."""


def mixture(share: float, batch_size: int, seed: int = 5) -> Mixture:
    new, old = (np.arange(97, dtype=np.uint16) + start for start in (0, OLD))
    return Mixture(Windows(new, 4, batch_size, seed), Windows(old, 4, batch_size, seed), share)


def old_rows(share: float, batch_size: int, steps: int) -> list[int]:
    mixed = mixture(share, batch_size)
    return [int((mixed.batch(step)["idx"][:, 0] >= OLD).sum()) for step in range(steps)]


@pytest.mark.parametrize(("share", "batch_size", "expected"), [
    (0.25, 8, [2, 2, 2, 2]), (0.2, 8, [1, 2, 1, 2, 2]), (0.1, 4, [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]),
    (0.5, 1, [0, 1, 0, 1]), (0.0, 8, [0, 0, 0]), (0.99, 4, [3, 4, 4, 4]), (0.29, 100, [29] * 6),
])  # fmt: skip
def test_whole_rows_come_as_close_to_the_share_as_they_can(share: float, batch_size: int, expected: list[int]) -> None:
    """0.29 * 100 is less than 29 in floating point."""
    assert old_rows(share, batch_size, len(expected)) == expected


@pytest.mark.parametrize(("share", "batch_size"), [(0.2, 8), (0.3, 5), (0.75, 3)])
def test_each_text_is_read_in_the_order_of_its_windows(share: float, batch_size: int) -> None:
    """No window is skipped or repeated: the rows of each text are those of its `Windows` alone."""
    mixed, steps = mixture(share, batch_size), 20
    rows = torch.cat([mixed.batch(step)["target"] for step in range(steps)])
    for windows, of_text in ((mixed.new, rows[:, 0] < OLD), (mixed.old, rows[:, 0] >= OLD)):
        alone = torch.cat([windows.batch(step)["target"] for step in range(steps)])
        assert torch.equal(rows[of_text], alone[: int(of_text.sum())])


def test_batches_are_a_function_of_seed_and_step() -> None:
    """Also in another order, as after a resume; another seed gives other batches."""
    forward = [mixture(0.3, 6).batch(step) for step in range(9)]
    again = mixture(0.3, 6)
    for step in (8, 3, 5, 0):
        assert all(torch.equal(forward[step][name], again.batch(step)[name]) for name in ("idx", "target"))
    assert not torch.equal(mixture(0.3, 6, seed=6).batch(0)["idx"], forward[0]["idx"])


@pytest.mark.parametrize(("world", "number"), [(2, 1), (4, 1), (2, 2)])
def test_ranks_and_micro_batches_share_the_batch(world: int, number: int) -> None:
    """Together they have every row once."""
    batch = mixture(0.3, 8).batch(2)
    parts = [micro["idx"] for rank in range(world)
             for micro in micro_batches(batch, number, Dist(rank, world, torch.device("cpu")), rank)]
    assert sorted(torch.cat(parts).tolist()) == sorted(batch["idx"].tolist())


def test_messages_name_the_windows_of_both_texts() -> None:
    mixed = mixture(0.25, 8)
    assert mixed.describe_batch(0) == ("epoch 1, windows 1 to 6 (23 per epoch), and replayed epoch 1, windows 1 to 2 "
                                       "(23 per epoch)")
    assert mixture(0.0, 8).describe_batch(1) == mixed.new.describe_batch(1)
