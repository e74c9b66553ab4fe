"""Exact resume for all 48 combinations of settings, in fresh processes: 10 steps against 5 and 5."""

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
def test_ten_steps_equal_five_and_five(cell: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    """A process is killed after its checkpoint of step 5; another one resumes; the bits are the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("train", text, "--out", whole, *settings(*cell)), check=True, capture_output=True)
    first = subprocess.Popen(command("train", text, "--out", killed, *settings(*cell)), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    five, ten = (killed / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    while not five.exists() and first.poll() is None:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    if ten.exists():  # it finished before the kill: remove the later checkpoint
        for path in ten.iterdir():
            path.unlink()
        ten.rmdir()
    done = subprocess.run(command("resume", killed, "--json"), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["resumed_from"] == 5
    assert fingerprint(killed, 10) == fingerprint(whole, 10)
    assert without_times(killed) == without_times(whole)
    assert manifest.sha256(killed / "model.safetensors") == manifest.sha256(whole / "model.safetensors")
