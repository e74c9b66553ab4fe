"""Fifty signals at random times: the run saves and stops, and resumes exactly."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invariants.test_kills import BEGINS, command, newest, outcome, whole  # noqa: F401 (a fixture)

from bardlet.config.toml import read_toml
from bardlet.run import checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def finished(run: Path) -> bool:
    """Return True if run.toml marks the run as finished."""
    return (run / "run.toml").exists() and bool(read_toml(run / "run.toml")[1].get("finished"))


def start(run: Path, text: Path) -> subprocess.Popen[str]:
    """Start or resume the run, and return once it has printed its first line."""
    arguments = [sys.executable, "-m", "bardlet", *map(str, command(run, text))]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(BEGINS):
            return process
    raise AssertionError(output)


@pytest.mark.parametrize("seed", range(10))
def test_signals_at_random_times(seed: int, text: Path, tmp_path: Path,
                                 whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """Five signals that stop a run: each gives its own exit code, and the step in the message was saved."""
    expected, between_saves = whole
    chance, stopped, run = random.Random(seed), 0, tmp_path / "0"
    for attempt in range(60):
        if stopped == 5:
            break
        if finished(run):
            assert outcome(run) == expected
            run = tmp_path / f"{attempt}"
        process = start(run, text)
        number = chance.choice(SIGNALS)
        time.sleep(chance.uniform(0, 3 * between_saves))
        process.send_signal(number)
        out = process.communicate()[0]
        if process.returncode == 0:  # it finished before the signal
            assert finished(run), out
        elif not run.exists():  # stopped before training, without leaving a folder
            assert process.returncode == 128 + number and "interrupted" in out, out
        else:
            assert process.returncode == 128 + number, out
            step = re.search(r"stopped after step (\d+), and saved; continue with `bardlet resume", out)
            assert step and newest(run) == int(step[1]), out
            stopped += 1
    assert stopped == 5
    while not finished(run):
        process = start(run, text)
        assert process.wait() == 0
    assert outcome(run) == expected
    assert checkpoint.newest_intact(run).name == "step-00000060"
