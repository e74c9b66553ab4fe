"""No exit loses steps: after an error or a lost output, the run is saved, and it resumes bit for bit."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run

from bardlet import console
from bardlet.cli import main
from bardlet.config.toml import read_toml
from bardlet.data.windows import Windows
from bardlet.run import checkpoint, diagnosis, hf, plots
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.stages import pretrain
from bardlet.training import checks, losses, optim, step, trainer

SMALL = ["--model", "qwen3", "--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size",
         "4", "--log-every", "3", "--warmup-steps", "2", "--threads", "1", "--steps", "12", "--save-every", "0",
         "--eval-every", "4", "--dtype", "fp32", "--compile", "off", "--keep", "best"]  # fmt: skip

PLACES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "batch": (trainer, "seed_step", (2, 7, 12)), "micro-batch": (step, "micro_batches", (2, 7, 12)),
    "gradient": (torch.nn.utils, "clip_grad_norm_", (2, 7, 12)), "learning rate": (optim, "learning_rate", (2, 7, 12)),
    "evaluation": (trainer, "_evaluate", (1, 2, 3)), "log": (trainer, "_log", (1, 2, 4)),
    "clock": (trainer, "_replan", (3, 8)), "display": (console.StepText, "__call__", (1, 5, 12)),
    "loss": (losses, "next_token_loss", (5,)), "count": (losses, "count_targets", (3, 19)),
    "windows": (Windows, "batch_at", (6,)), "precision": (step, "autocast", (4,)),
    "backward": (torch.Tensor, "backward", (8,)), "device": (Dist, "to_device", (11,)),
    "metrics": (trainer.metrics, "append_metrics", (2, 6)), "best weights": (hf, "write_weights", (1, 3)),
    "run.toml": (trainer, "write_run", (3,)), "diagnosis": (diagnosis, "of_losses", (9,)),
    "learning rates": (optim, "set_learning_rate", (10,)), "save": (trainer, "save", (1,)),
    "one evaluation": (trainer, "evaluate", (2,)),
}  # fmt: skip
"""Functions that raise an error in the run of a test, and at which of their calls."""
AT_THE_END: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "finish": (trainer, "finish", (1,)), "average": (trainer, "average_weights", (1,)),
    "last evaluation": (trainer, "evaluate", (4,)), "picture": (plots, "loss_curve", (1,)),
}  # fmt: skip
"""The same after the last step, which is saved already."""
DURING_UPDATES: dict[str, tuple[Any, str, int]] = {
    "check": (checks, "check_numbers", 8), "adamw": (optim.AdamW, "step", 7), "muon": (optim.Muon, "step", 9),
    "average": (trainer, "add_to_average", 10), "targets": (losses, "count_targets", 14),
}  # fmt: skip
"""The same while weights change."""


@pytest.fixture(scope="module", autouse=True)
def short_endings() -> Iterator[None]:
    """End runs without a picture and with a sample of one token: that takes longer than the training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "loss_curve", lambda *args, **options: None)
        patch.setattr(pretrain, "SAMPLE_TOKENS", 1)
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="module")
def whole(short_endings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("exits")
    (folder / "text.txt").write_text("".join(f"the {n} birds of {n * 7 % 31} rivers\n" for n in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output := io.StringIO())
        patch.chdir(folder)
        assert main(["train", "text.txt", *SMALL, "--out", "whole", "--debug"]) == 0
    (folder / "output.txt").write_text(output.getvalue())
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


@pytest.mark.parametrize("place", AT_THE_END)
def test_an_error_after_the_last_step_leaves_a_run_to_finish(place: str, whole: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    run, text = tmp_path / "run", str(whole.parent / "text.txt")
    module, name, [call] = AT_THE_END[place]
    with monkeypatch.context() as patch:
        fail_at(call, module, name, patch, RuntimeError("an accident"))
        assert main(["train", text, *SMALL, "--out", str(run)]) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]
    assert main(["resume", str(run), "--debug"]) == 0
    assert_same_run(whole, run, 12)


@pytest.mark.parametrize("place", DURING_UPDATES)
def test_an_error_within_an_update_is_not_saved(place: str, whole: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and step number do not belong together there; the last checkpoint stays."""
    run, text = tmp_path / "run", str(whole.parent / "text.txt")
    module, name, call = DURING_UPDATES[place]
    with monkeypatch.context() as patch:
        fail_at(call, module, name, patch, RuntimeError("an accident"))
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


class ClosesAfter(io.StringIO):
    """Standard output whose reader closes it after a number of bytes, or whose disk is full then."""

    def __init__(self, size: int, number: int) -> None:
        super().__init__()
        self.left, self.number = size, number

    def write(self, text: str) -> int:
        self.left -= len(text.encode())
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize(("number", "times"), [(errno.EPIPE, 20), (errno.ENOSPC, 6)])
def test_output_that_ends_at_any_byte_loses_no_step(number: int, times: int, whole: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """`bardlet train ... | head -c N` and a full disk, at random bytes of the output of the whole run."""
    text, chance = str(whole.parent / "text.txt"), random.Random(7)
    shown = (whole.parent / "output.txt").read_text()
    length = len(shown[shown.index("text: ") :]) - 40  # the tokens are in the cache now; and the times vary
    monkeypatch.chdir(tmp_path)
    ends: set[str] = set()
    resumed: dict[int, tuple[str, Path]] = {}
    for attempt, size in enumerate(sorted(chance.sample(range(length), times))):
        run = Path(f"run-{attempt}")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output := ClosesAfter(size, number))
            code = main(["train", text, *SMALL, "--out", str(run)])
        shown = [int(step) for step in re.findall(r"step +(\d+)/12", output.getvalue())]
        stopped = "and saved; continue with" in capsys.readouterr().err
        ends.add("before" if not run.exists() else "between" if stopped else "after")
        assert code == (128 + trainer.SIGPIPE if number == errno.EPIPE or stopped else 1)
        if not run.exists():
            assert not shown
            continue
        newest = checkpoint.newest_intact(run)
        step, state = int(newest.name[5:]), manifest.sha256(newest / "trainer.safetensors")
        assert step >= max(shown, default=1)
        if read_toml(run / "run.toml")[1].get("finished"):
            assert_same_run(whole, run, 12)
        elif resumed.setdefault(step, (state, run)) == (state, run):  # the same state continues in the same way
            assert main(["resume", str(run), "--debug"]) == 0
            assert_same_run(whole, run, 12)
        assert resumed.get(step, (state, run))[0] == state
    assert len(ends) == 3, "a seed with closings before, during and after the steps"


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
