"""--elastic 8: a run has the same bits on 1, 2, 4 and 8 processes, changed and killed on the way."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from runtime.test_heartbeat import SETTINGS as FEW_STEPS
from runtime.test_heartbeat import Launch, outcome

SETTINGS = [*FEW_STEPS, "--batch-size", "16", "--steps", "200", "--eval-every", "50", "--elastic", "8", "--threads",
            "1"]
MODELS = {
    "qwen3": ["--model", "qwen3"],
    "gpt2, accumulating, AdamW": ["--model", "gpt2", "--batch-size", "8", "--grad-accum", "2", "--optimizer", "adamw"],
    "qwen3, compiled": ["--model", "qwen3", "--compile", "on", "--steps", "60"],
}
COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The outcome of one process."""
    folder = tmp_path_factory.mktemp("whole")
    Launch(folder / "log", "train", text, "--out", folder / "run", *SETTINGS, processes=1).ends(0)
    return outcome(folder / "run")


@pytest.mark.parametrize("model", MODELS)
def test_any_number_of_processes(model: str, text: Path, tmp_path: Path) -> None:
    """Weights, optimizer and metrics."""
    outcomes = []
    for count in COUNTS:
        run = tmp_path / str(count)
        Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS, *MODELS[model], processes=count).ends(0)
        outcomes.append(outcome(run))
    assert outcomes[1:] == outcomes[:1] * 3


def test_pairs(tmp_path: Path) -> None:
    """An encoder-decoder, with rows of different widths."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    chance = random.Random(0)
    lines = [" ".join(chance.choices(words, k=chance.randint(2, 9))) for _ in range(2000)]
    (tmp_path / "source").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "target").write_text("\n".join(line[::-1] for line in lines), encoding="utf-8")
    outcomes = []
    for count in COUNTS:
        run = tmp_path / str(count)
        Launch(tmp_path / "log", "train", "--source", tmp_path / "source", "--target", tmp_path / "target",
               "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--batch-tokens", "512", "--steps", "60",
               "--eval-every", "0", "--save-every", "20", "--dtype", "fp32", "--compile", "off", "--dropout", "0.1",
               "--vocab-size", "300", "--elastic", "8", "--threads", "1", "--out", run, processes=count).ends(0)
        outcomes.append(outcome(run))
    assert outcomes[1:] == outcomes[:1] * 3


@pytest.mark.parametrize("chance", range(5))
def test_the_number_changes_on_the_way(chance: int, text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """8, 2, 4, 1 processes; each but the last is killed or stopped, twenty in all, at a random moment."""
    run, moments = tmp_path / "run", random.Random(chance)

    def launch(count: int) -> Launch:
        """A run that was killed before its first checkpoint may leave no folder to resume."""
        argv = ["resume", run] if run.exists() else ["train", text, "--out", run, *SETTINGS]
        return Launch(tmp_path / f"log{count}", *argv, processes=count)

    for count in (8, 2, 4, 1):
        started = launch(count)
        started.wait_for(run / "run.toml")
        time.sleep(moments.uniform(0, 6))
        if started.launcher.poll() is None and (pids := started.workers()):
            os.kill(moments.choice(list(pids.values())), moments.choice([signal.SIGKILL, signal.SIGTERM]))
        started.launcher.wait(600)
        if is_finished(run):
            break
    if not is_finished(run):
        launch(2).ends(0)
    assert outcome(run) == whole


def is_finished(run: Path) -> bool:
    """Return True if a run has ended."""
    return run.exists() and "finished = true" in (run / "run.toml").read_text(encoding="utf-8")
