"""Several processes: one that is killed is named, nothing hangs, and those that go on end with the same bits.

tests/acceptance/test_two_processes.py kills twenty times.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import HANGS, in_two_processes

from bardlet.run import checkpoint, metrics
from bardlet.runtime import manifest

SETTINGS = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4",
            "--steps", "60", "--save-every", "20", "--eval-every", "0", "--warmup-steps", "2", "--dtype", "fp32",
            "--compile", "off", "--dropout", "0.1", "--keep-checkpoints", "9"]


class Launch:
    """`bardlet WORDS --json` in two processes of torchrun."""

    def __init__(self, log: Path, *words: str | Path, restarts: int = 0, program: Sequence[str] = ("-m", "bardlet")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   "--max-restarts", str(restarts), *program, *map(str, words), "--json"]
        self.log = log
        with open(log, "w", encoding="utf-8") as file:
            self.launcher = subprocess.Popen(command, stdout=file, stderr=file,
                                             env={**os.environ, "OMP_NUM_THREADS": "1"})

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        pid, found = self.launcher.pid, {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
        return found

    def wait_for(self, path: Path) -> None:
        """Until `path` is there."""
        while not path.exists():
            assert self.launcher.poll() is None, self.said()
            time.sleep(0.01)

    def ends(self, code: int | None = None) -> str:
        """What it has said when it has ended; a process that waits for one that is lost would never end."""
        try:
            self.launcher.wait(timeout=HANGS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {HANGS} s: {self.said()}") from None
        assert (self.launcher.returncode == code) if code is not None else self.launcher.returncode, self.said()
        return self.said()


def outcome(run: Path) -> dict[str, object]:
    """The bits with which a run has ended."""
    last = checkpoint.newest_whole(run)
    values = [(line["step"], line.get("train_loss"), line.get("val_loss")) for line in metrics.read_metrics(run)]
    return {"step": last.name, "metrics": values, "root": manifest.sha256(run / "model.safetensors"),
            **{name: manifest.sha256(last / name) for name in ("model.safetensors", "trainer.safetensors")}}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The outcome of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(["train", text, "--out", folder / "run", *SETTINGS], folder / "log")
    return outcome(folder / "run")


def resumed_from(said: str) -> int | None:
    """The step from which a command that has ended went on."""
    step: int | None = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])["resumed_from"]
    return step


KILLED = """
import os, signal, sys
from bardlet.cli import main
from bardlet.training import trainer

update, done = trainer.train_step, []

def once(*args):
    done.append(1)
    if len(done) == 30 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)

trainer.train_step = once
sys.exit(main(sys.argv[1:]))
"""
"""Rank 1 is killed in its thirtieth update, but not when it is started again."""


def test_torchrun_starts_them_again_and_the_run_goes_on(text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """Rank 1 is killed after step 29: rank 0 names it and ends; the two that torchrun starts resume, exactly."""
    run, program = tmp_path / "run", tmp_path / "killed.py"
    program.write_text(KILLED)
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS, restarts=1, program=[str(program)])
    said = launch.ends(0)
    assert re.search(r"bardlet: process 1 of 2 \(pid \d+ on .*\) was killed; torchrun starts all of them", said), said
    assert resumed_from(said) == 20
    assert outcome(run) == whole
