"""Append one line per finished run to a results file: figures, machine and commit.

Most benchmarks append their line when they end. A ladder's runs were measured earlier: their lines have the date,
versions and machine that the runs recorded, plus `recorded` and `recorded_commit` for the time of writing the line.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@cache
def commit() -> str | None:
    """Return the current commit, with `+` if a tracked file was changed; None outside a checkout.

    Changes to the files that benchmarks write, the results and the board, do not count. Cached for all lines of a run.
    """
    paths = (":/", ":(exclude)results", ":(exclude)README.md")
    try:
        head = git("describe", "--always", "--abbrev=12")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    except OSError:
        return None
    return head + "+" * bool(changed) if head else None


def git(*arguments: str) -> str:
    """Return git's output in this checkout; "" if it fails."""
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()


def product_rate(dtype: str = "fp32") -> float:
    """Return the GFLOP/s of a large product in fp32 or bf16: what this machine can do at the moment."""
    import torch

    a = torch.randn(1024, 1024, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e9


def read(name: str) -> list[dict[str, Any]]:
    """Return the lines of results/NAME.jsonl, oldest first; none if there is no such file."""
    path = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(name: str, figures: dict[str, Any]) -> None:
    """Append a line to results/NAME.jsonl for a measurement made now: date, commit, machine and figures."""
    import torch

    from bardlet.runtime.device import pick_dtype, processor

    # different processors may share a name; natively supported precision tells them apart
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "native": pick_dtype("auto", torch.device("cpu")), "torch": torch.__version__}
    write(name, {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine, **figures})


def append_earlier(name: str, figures: dict[str, Any]) -> None:
    """Append a line for an earlier measurement, whose `figures` contain date and machine."""
    write(name, {"recorded": time.strftime("%Y-%m-%d"), "recorded_commit": commit(), **figures})


def write(name: str, line: dict[str, Any]) -> None:
    """Append a line to results/NAME.jsonl."""
    path = HERE / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
