"""Check an attempt within this process, without training: the tests of a file's structure take a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bardlet.data.named import python_docs
from bardlet.ladder.check import examine
from bardlet.ladder.check.judge import judge
from bardlet.ladder.check.load import MODULE, Loaded, load
from bardlet.ladder.check.run import plain
from bardlet.ladder.check.source import read
from bardlet.ladder.exercises.table import Exercise

TEXT = plain(python_docs()[:50_000])


def report(code: str, folder: Path, rung: int | None = None, name: str | None = None,
           until: float = 0.0) -> examine.Report:
    """Return the report on a learner's code. until: a time of time.monotonic, until which models are trained."""
    return _loaded(code, folder, lambda loaded: examine.examine(loaded, rung, name, until=until))


def judged(code: str, folder: Path, exercise: Exercise) -> examine.Report:
    """Return the report on an exercise."""
    return _loaded(code, folder, lambda loaded: judge(loaded, exercise.name, exercise.rung))


def _loaded(code: str, folder: Path, test: Callable[[Loaded], examine.Report]) -> examine.Report:
    """Return the report of a test, and undo what loading changes in this process."""
    path = folder / "attempt.py"
    path.write_text(code, encoding="utf-8")
    kept = list(sys.meta_path), {kind: kind.cuda for kind in (torch.Tensor, nn.Module)}
    try:
        return test(load(read(path), TEXT))
    finally:
        sys.meta_path[:] = kept[0]
        sys.modules.pop(MODULE, None)
        for kind, method in kept[1].items():
            kind.cuda = method
