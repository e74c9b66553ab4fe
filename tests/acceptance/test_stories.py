"""The recipes in recipes/, from text to a chat model, at 1 % of their time."""

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
def test_recipe_prints_its_table_and_runs_once(story: str, tmp_path: Path) -> None:
    """The table has a row per stage, with figures before and after; a second call repeats no stage."""
    data = Path(os.environ.get("BARDLET_DATA") or "none")
    for name in ("alpaca", "alpaca-eval-preferences", "eltec-eng", "tinystories-lower", "factbook"):
        if not (data / name).is_dir():
            pytest.skip(f"{name} is not in $BARDLET_DATA")
    command = tmp_path / "bardlet"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m bardlet "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "BARDLET": str(command), "PYTHON": sys.executable, "FRACTION": "0.01"}

    def run_recipe() -> str:
        done = subprocess.run(["bash", str(ROOT / "recipes" / f"{story}.sh"), str(tmp_path / "runs")], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    first = run_recipe()
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert tuple(row[0] for row in rows) == STAGES
    for name, _, *figures in rows:
        assert len(figures) == 3 and all(math.isfinite(float(figure)) for figure in figures), name
    again = run_recipe()
    assert again.count("already finished") == len(STAGES)
    assert [line for line in again.splitlines() if line.startswith("| ")] == [
        line for line in first.splitlines() if line.startswith("| ")]  # fmt: skip
