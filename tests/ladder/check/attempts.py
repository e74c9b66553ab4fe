"""Check an attempt within this process, without training: the tests of a file's structure take a second."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from bardlet.data.named import python_docs
from bardlet.ladder.check import examine
from bardlet.ladder.check.load import MODULE, load
from bardlet.ladder.check.run import plain
from bardlet.ladder.check.source import read

TEXT = plain(python_docs()[:50_000])


def report(code: str, folder: Path, rung: int | None = None, name: str | None = None,
           until: float = 0.0) -> examine.Report:
    """Return the report on a learner's code. until: a time of time.monotonic, until which models are trained."""
    path = folder / "attempt.py"
    path.write_text(code, encoding="utf-8")
    kept = list(sys.meta_path), {kind: kind.cuda for kind in (torch.Tensor, nn.Module)}
    try:
        return examine.examine(load(read(path), TEXT), rung, name, until=until)
    finally:
        sys.meta_path[:] = kept[0]
        sys.modules.pop(MODULE, None)
        for kind, method in kept[1].items():
            kind.cuda = method
