"""The full product of exact resume, in fresh processes: 48 cells, each 10 steps against 5 and 5."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invariants.test_resume import EXTRAS, MODES, fingerprint, settings, without_times

from bardlet.runtime import manifest

CELLS = list(itertools.product(["gpt2", "qwen3", "bigram"], ["adamw", "muon"], MODES, EXTRAS))


def command(*argv: str | Path) -> list[str]:
    return [sys.executable, "-m", "bardlet", *map(str, argv)]


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_ten_steps_are_five_and_five(cell: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    """A process is killed once its checkpoint of step 5 is there; another one goes on; the bits are the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command("train", text, "--out", whole, *settings(*cell)), check=True, capture_output=True)
    first = subprocess.Popen(command("train", text, "--out", broken, *settings(*cell)), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    five, ten = (broken / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    while not five.exists() and first.poll() is None:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    if ten.exists():  # it was quicker than the kill: what it did after step 5 is taken away
        for path in ten.iterdir():
            path.unlink()
        ten.rmdir()
    done = subprocess.run(command("resume", broken, "--json"), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["resumed_from"] == 5
    assert fingerprint(broken, 10) == fingerprint(whole, 10)
    assert without_times(broken) == without_times(whole)
    assert manifest.sha256(broken / "model.safetensors") == manifest.sha256(whole / "model.safetensors")
