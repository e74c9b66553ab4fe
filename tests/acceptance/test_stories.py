"""The stories of recipes/, from text to a chat model, in a small part of their time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("base", "sft", "judge", "ppo", "dpo", "sums-base", "sums-sft", "sums-grpo")


@pytest.mark.parametrize("story", ["laptop", "gpu"])
def test_a_story_runs_to_its_table_and_is_not_told_twice(story: str, tmp_path: Path) -> None:
    """A row for each stage with a figure before and after; called again, everything is there already."""
    data = Path(os.environ.get("BARDLET_DATA") or "none")
    for needed in ("alpaca", "alpaca-eval-preferences", "eltec-eng", "tinystories-lower", "factbook"):
        if not (data / needed).is_dir():
            pytest.skip(f"{needed} is not in $BARDLET_DATA")
    command = tmp_path / "bardlet"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m bardlet "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "BARDLET": str(command), "PYTHON": sys.executable, "FRACTION": "0.01"}

    def told() -> str:
        done = subprocess.run(["bash", str(ROOT / "recipes" / f"{story}.sh"), str(tmp_path / "runs")], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    first = told()
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert tuple(row[0] for row in rows) == STAGES
    for name, _, *figures in rows:
        assert len(figures) == 3 and all(math.isfinite(float(figure)) for figure in figures), name
    again = told()
    assert again.count("already finished") == len(STAGES)
    assert [line for line in again.splitlines() if line.startswith("| ")] == [
        line for line in first.splitlines() if line.startswith("| ")]  # fmt: skip
