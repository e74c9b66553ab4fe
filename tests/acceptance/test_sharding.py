"""Processes that share a model train what one process trains: every stage, optimizer and number of processes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from sharded_runs import EAGER, SLICES, STAGES, TRAINING, Runs, difference

COUNTS = (1, 2, 3, 4, 8)
COMBINATIONS = [(count, stage, ("muon", "adamw")[(i + j) % 2], 1 + (i + j // 2) % 2)
                for i, count in enumerate(COUNTS) for j, stage in enumerate(STAGES)]
"""(processes, stage, optimizer, accumulation): every pair of two of their values is in one of them."""


def test_every_pair_is_covered() -> None:
    for a in range(4):
        for b in range(a):
            values = [{row[each] for row in COMBINATIONS} for each in (a, b)]
            assert len({(row[a], row[b]) for row in COMBINATIONS}) == len(values[0]) * len(values[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sharded"))


@cache
def alone(runs: Runs, stage: str, optimizer: str, accumulation: int, double: bool) -> Path:
    """Return the last checkpoint of one process."""
    return runs.last_checkpoint(1, arguments(runs, stage, optimizer, accumulation, double), double)


def arguments(runs: Runs, stage: str, optimizer: str, accumulation: int, double: bool) -> list[str | Path]:
    """Return a command line: 50 steps in float64, 10 in float32."""
    return [*runs.argv(stage), *TRAINING, *EAGER, *SLICES, "--optimizer", optimizer, "--grad-accum", str(accumulation),
            "--steps", "50" if double else "10"]


@pytest.mark.parametrize(("count", "stage", "optimizer", "accumulation"), COMBINATIONS)
def test_sharded_processes_train_the_same_model(count: int, stage: str, optimizer: str, accumulation: int,
                                                runs: Runs) -> None:
    """After 50 steps in float64, with dropout."""
    sharded = runs.last_checkpoint(count, arguments(runs, stage, optimizer, accumulation, True))
    assert not difference(sharded, alone(runs, stage, optimizer, accumulation, True), 1e-9)
