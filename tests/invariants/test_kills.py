"""SIGKILL at random times, again and again until the run is done: it ends with the bits of the run that nobody killed.

tests/acceptance/test_kills.py kills 200 times.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bardlet import checkpoint, files
from bardlet.config import read_toml

JOB = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "32", "--batch-size", "4",
       "--grad-accum", "2", "--steps", "60", "--save-every", "10", "--eval-every", "7", "--dropout", "0.1",
       "--dtype", "fp32", "--compile", "off", "--threads", "1", "--warmup-steps", "5", "--log-every", "3"]
BEGINS = ("plan:", "going on after", "it ended before")
"""How the line starts after which there is something to lose."""


def command(run: Path, text: Path) -> list[str]:
    """What begins the run, or goes on with it."""
    words = ["resume", str(run)] if (run / "run.toml").exists() else ["train", str(text), "--out", str(run), *JOB]
    return [sys.executable, "-m", "bardlet", *words]


def outcome(run: Path) -> dict[str, object]:
    """Everything that must be the same: weights, optimizer, random state, step, metrics without times."""
    last = checkpoint.newest_whole(run)
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
             for line in checkpoint.read_metrics(run)]
    record = read_toml(run / "run.toml")[1]
    return {"step": last.name, "weights": files.sha256(last / "model.safetensors"),
            "state": files.sha256(last / "trainer.safetensors"), "metrics": lines,
            "root": files.sha256(run / "model.safetensors"), "selected": record["selected_step"]}


def start(run: Path, text: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that trains, and the line with which it begins to."""
    process = subprocess.Popen(command(run, text), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(BEGINS):
            return process, line
    raise AssertionError(said)


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 before the first."""
    return max((int(folder.name[5:]) for folder in checkpoint.steps_saved(run)), default=0)


def reach(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the checkpoint of a step is there."""
    while newest(run) < step and process.poll() is None:
        time.sleep(0.001)


def run_to_the_end(run: Path, text: Path, kills: int, chance: random.Random, seconds: float) -> list[str]:
    """Kill the run `kills` times, within `seconds` of a checkpoint, and let it finish: how each of its starts began."""
    said: list[str] = []
    while not ((run / "run.toml").exists() and read_toml(run / "run.toml")[1].get("finished")):
        process, line = start(run, text)
        said.append(line)
        if len(said) <= kills:
            reach(run, chance.randrange(newest(run), 61, 10), process)
            time.sleep(chance.uniform(0, seconds))
            process.send_signal(signal.SIGKILL)
        out = process.communicate(timeout=200)[0]
        assert process.returncode in (0, -signal.SIGKILL), out
        if any(line.startswith("going on after") for line in said):
            checkpoint.newest_whole(run)  # never without one after the first
    return said


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], float]:
    """The outcome of the run that nobody kills, and how many seconds lie between its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "again"):  # what is kept in the cache is made by the first
        process, _ = start(folder / name, text)
        reach(folder / name, 10, process)
        begun = time.monotonic()
        reach(folder / name, 60, process)
        seconds = (time.monotonic() - begun) / 5
        assert process.communicate(timeout=200) and process.returncode == 0
    assert outcome(folder / "first") == outcome(folder / "again")
    return outcome(folder / "again"), seconds


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_times(seed: int, text: Path, tmp_path: Path, whole: tuple[dict[str, object], float]) -> None:
    """Three or four kills a run, ten in all; each later start goes on from a checkpoint, or begins where none is."""
    expected, seconds = whole
    said = run_to_the_end(tmp_path / "run", text, 4 - (seed > 0), random.Random(seed), seconds)
    assert outcome(tmp_path / "run") == expected
    assert len(said) > 1, "nothing was killed"
