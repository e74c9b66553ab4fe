"""SIGKILL at random times, with restarts until the run is done: it ends with the bits of an undisturbed run.

tests/acceptance/test_kills.py kills 200 times.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import end_of, start

from bardlet.config.toml import read_toml
from bardlet.run import checkpoint, metrics
from bardlet.runtime import manifest

JOB = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "32", "--batch-size", "4",
       "--grad-accum", "2", "--steps", "60", "--save-every", "10", "--eval-every", "7", "--dropout", "0.1",
       "--dtype", "fp32", "--compile", "off", "--threads", "1", "--warmup-steps", "5", "--log-every", "3"]
BEGINS = ("plan:", "continuing after", "no checkpoint yet")
"""Beginnings of the line that a command prints right before its first step."""


def command(run: Path, text: Path) -> list[str | Path]:
    """Return the command that starts the run, or resumes it."""
    return ["resume", run] if (run / "run.toml").exists() else ["train", text, "--out", run, *JOB]


def outcome(run: Path) -> dict[str, object]:
    """Return everything that must be the same: weights, optimizer, random state, step, metrics without times."""
    last = checkpoint.newest_intact(run)
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
             for line in metrics.read_metrics(run)]
    record = read_toml(run / "run.toml")[1]
    return {"step": last.name, "weights": manifest.sha256(last / "model.safetensors"),
            "state": manifest.sha256(last / "trainer.safetensors"), "metrics": lines,
            "root": manifest.sha256(run / "model.safetensors"), "selected": record["selected_step"]}


def begin(run: Path, text: Path) -> tuple[Any, str]:
    """Start the run or resume it; return the process and the line it prints before its first step."""
    log = run.with_name(f"{run.name}.log")
    log.unlink(missing_ok=True)
    process = start(command(run, text), log)
    while True:
        alive = process.is_alive()
        output = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        if line := next((line for line in output if line.startswith(BEGINS) and line.endswith("\n")), None):
            return process, line
        assert alive, output
        time.sleep(0.001)


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 before the first."""
    return max((int(folder.name[5:]) for folder in checkpoint.steps_saved(run)), default=0)


def reach(run: Path, step: int, process: Any) -> None:
    """Wait until the checkpoint of `step` exists or the process has ended."""
    while newest(run) < step and process.is_alive():
        time.sleep(0.001)


def run_to_the_end(run: Path, text: Path, kills: int, rng: random.Random, seconds: float) -> int:
    """Kill the run up to `kills` times, within `seconds` after a checkpoint, and let it finish; return the kills."""
    killed, saved = 0, False
    while not ((run / "run.toml").exists() and read_toml(run / "run.toml")[1].get("finished")):
        process, line = begin(run, text)
        assert line.startswith("continuing after") or not saved, line  # it never starts over after a save
        if killed < kills:
            reach(run, rng.randrange(newest(run), 61, 10), process)
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        end_of(process)
        assert process.exitcode in (0, -signal.SIGKILL), run.with_name(f"{run.name}.log").read_text(encoding="utf-8")
        killed += process.exitcode == -signal.SIGKILL
        saved = saved or newest(run) > 0
        if saved:
            checkpoint.newest_intact(run)  # after the first save there is always an intact checkpoint
    return killed


def kill(times: int, seed: int, text: Path, folder: Path, whole: tuple[dict[str, object], float]) -> None:
    """Kill runs up to five times each, `times` in all; each must end like the undisturbed run `whole`."""
    killed, rng = 0, random.Random(seed)
    while killed < times:
        run = folder / f"{killed}-{rng.random()}"
        killed += run_to_the_end(run, text, min(5, times - killed), rng, whole[1])
        assert outcome(run) == whole[0]
    assert killed == times


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], float]:
    """The outcome of an undisturbed run, and the seconds between its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "again"):  # the first run fills the cache
        process, _ = begin(folder / name, text)
        reach(folder / name, 10, process)
        started = time.monotonic()
        reach(folder / name, 60, process)
        seconds = (time.monotonic() - started) / 5
        assert end_of(process) == 0
    assert outcome(folder / "first") == outcome(folder / "again")
    return outcome(folder / "again"), seconds


def test_killed_at_random_times(text: Path, tmp_path: Path, whole: tuple[dict[str, object], float]) -> None:
    """Four kills; each restart resumes from a checkpoint, or starts over if there is none."""
    kill(4, 0, text, tmp_path, whole)
