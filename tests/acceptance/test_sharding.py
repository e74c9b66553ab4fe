"""Processes that share a model train what one process trains: every stage, optimizer and number of processes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from sharded_runs import EAGER, SLICES, STAGES, TRAINING, Runs, difference

from bardlet.run import metrics

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
    """Return the run of one process."""
    return runs.train(1, arguments(runs, stage, optimizer, accumulation, double), double)


def arguments(runs: Runs, stage: str, optimizer: str, accumulation: int, double: bool) -> list[str | Path]:
    """Return a command line: 50 steps in float64, 10 in float32."""
    return [*runs.argv(stage), *TRAINING, *EAGER, *SLICES, "--optimizer", optimizer, "--grad-accum", str(accumulation),
            "--steps", "50" if double else "10"]


@pytest.mark.parametrize(("count", "stage", "optimizer", "accumulation"), COMBINATIONS)
def test_sharded_processes_train_the_same_model(count: int, stage: str, optimizer: str, accumulation: int,
                                                runs: Runs) -> None:
    """After 50 steps in float64, with dropout."""
    sharded = runs.train(count, arguments(runs, stage, optimizer, accumulation, True))
    assert not difference(sharded, alone(runs, stage, optimizer, accumulation, True), 1e-9)


def test_two_machines_with_a_copy_each(runs: Runs) -> None:
    """Two processes on each of two machines: two copies of two shares."""
    argv = arguments(runs, "qwen3", "muon", 1, True)
    sharded = runs.train(4, argv, environment={"LOCAL_WORLD_SIZE": "2"})
    assert not difference(sharded, alone(runs, "qwen3", "muon", 1, True), 1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_losses_in_fp32(count: int, runs: Runs) -> None:
    """Ten steps: each training loss is that of one process within 1e-4."""
    argv = [*arguments(runs, "gpt2", "muon", 2, False), "--log-every", "1"]
    lines = []
    for run in (runs.train(count, argv, double=False), runs.train(1, argv, double=False)):
        lines.append([line["train_loss"] for line in metrics.read_metrics(run) if "train_loss" in line])
    assert len(lines[0]) == 10
    assert lines[0] == pytest.approx(lines[1], rel=0, abs=1e-4)
