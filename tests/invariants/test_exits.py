"""No exit loses steps: after an error or a lost output, the run is saved, and it resumes bit for bit."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run

from bardlet import console
from bardlet.cli import main
from bardlet.training import optim, trainer

SMALL = ["--model", "qwen3", "--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size",
         "4", "--log-every", "3", "--warmup-steps", "2", "--threads", "1", "--steps", "12", "--save-every", "0",
         "--eval-every", "4", "--dtype", "fp32", "--compile", "off", "--keep", "best"]  # fmt: skip

PLACES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "batch": (trainer, "seed_step", (2, 7, 12)), "micro-batch": (trainer, "micro_batches", (2, 7, 12)),
    "gradient": (torch.nn.utils, "clip_grad_norm_", (2, 7, 12)), "learning rate": (optim, "learning_rate", (2, 7, 12)),
    "evaluation": (trainer, "_evaluate", (1, 2, 3)), "log": (trainer, "_log", (1, 2, 4)),
    "clock": (trainer, "_replan", (3, 8)), "display": (console.StepText, "__call__", (1, 5, 12)),
}  # fmt: skip
"""Functions that raise an error in the run of a test, and at which of their calls."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("exits")
    (folder / "text.txt").write_text("".join(f"the {n} birds of {n * 7 % 31} rivers\n" for n in range(300)))
    assert main(["train", str(folder / "text.txt"), *SMALL, "--out", str(folder / "whole"), "--debug"]) == 0
    return folder / "whole"


def fail_at(call: int, module: Any, name: str, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make a function raise at its n-th call, counted from 1."""
    original, calls = getattr(module, name), 0

    def function(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*args, **options)

    patch.setattr(module, name, function)


@pytest.mark.parametrize(("place", "call"), [(place, call) for place in PLACES for call in PLACES[place][2]])
def test_an_error_at_any_place_loses_no_step(place: str, call: int, whole: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    run, text = tmp_path / "run", str(whole.parent / "text.txt")
    with monkeypatch.context() as patch:
        fail_at(call, *PLACES[place][:2], patch, RuntimeError("an accident"))
        code = main(["train", text, *SMALL, "--out", str(run)])
    output = capsys.readouterr()
    assert code == 1 and "internal error: RuntimeError: an accident" in output.err
    done = int(re.search(r"an error stopped the run after step (\d+), which is saved", output.err)[1])  # type: ignore[index]
    printed = re.findall(r"step +(\d+)/12", output.out)
    assert done >= max(map(int, printed), default=1) and (run / "checkpoints" / f"step-{done:08}").is_dir()
    assert main(["resume", str(run), "--debug"]) == 0
    assert_same_run(whole, run, 12)


def test_an_error_within_an_update_is_not_saved(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and step number do not belong together there; the last checkpoint stays."""
    run, text = tmp_path / "run", str(whole.parent / "text.txt")
    with monkeypatch.context() as patch:
        fail_at(8, trainer, "_check_numbers", patch, RuntimeError("an accident"))
        assert main(["train", text, *SMALL, "--save-every", "5", "--out", str(run)]) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert main(["resume", str(run), "--debug"]) == 0
    assert_same_run(whole, run, 12)


def start(run: Path, text: Path, stdout: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bardlet", "train", str(text), *SMALL, "--steps", "4000", "--out", str(run)]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)


def check_saved(process: subprocess.Popen[bytes], run: Path) -> None:
    """Assert that a process whose output was lost has saved its run and said so."""
    error = process.stderr.read().decode()  # type: ignore[union-attr]
    assert process.wait() == 128 + trainer.SIGPIPE, error
    step = int(re.search(r"stopped after step (\d+), and saved", error)[1])  # type: ignore[index]
    assert step > 0 and (run / "checkpoints" / f"step-{step:08}").is_dir()
    assert main(["resume", str(run), "--steps", str(step + 2), "--allow-change", "--debug"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other errors for a closed pipe")
@pytest.mark.parametrize("lines", [6])
def test_a_closed_pipe_saves_the_run(lines: int, whole: Path, tmp_path: Path) -> None:
    """https://github.com/JeffersonLab/PyPWA/issues/81: `bardlet train ... | head`."""
    process = start(tmp_path / "run", whole.parent / "text.txt", subprocess.PIPE)
    assert process.stdout
    while lines:
        lines -= process.stdout.readline().startswith(b"step")
    process.stdout.close()
    check_saved(process, tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_or_a_dead_terminal_behind_the_output_saves_the_run(
        number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run, text = tmp_path / "run", str(whole.parent / "text.txt")
    with monkeypatch.context() as patch:
        fail_at(5, console.StepText, "__call__", patch, OSError(number, os.strerror(number)))
        assert main(["train", text, *SMALL, "--out", str(run)]) == 128 + trainer.SIGPIPE
    assert "stopped after step 5, and saved; continue with `bardlet resume" in capsys.readouterr().err
    assert main(["resume", str(run), "--debug"]) == 0
    assert_same_run(whole, run, 12)
