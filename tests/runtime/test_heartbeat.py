"""Two ranks: a killed one is named, nothing hangs, and the restarted run ends with the same bits.

tests/acceptance/test_two_processes.py repeats this twenty times.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HANGS, in_two_processes
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bardlet.cli import main
from bardlet.run import checkpoint, metrics
from bardlet.runtime import manifest
from bardlet.training import trainer

SETTINGS = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4",
            "--steps", "60", "--save-every", "20", "--eval-every", "0", "--warmup-steps", "2", "--dtype", "fp32",
            "--compile", "off", "--dropout", "0.1", "--keep-checkpoints", "9"]


class Launch:
    """`bardlet ARGV --json` in processes of torchrun."""

    def __init__(self, log: Path, *argv: str | Path, restarts: int = 0, program: Sequence[str] = ("-m", "bardlet"),
                 processes: int = 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   "--max-restarts", str(restarts), *program, *map(str, argv), "--json"]
        self.log = log
        with open(log, "w", encoding="utf-8") as file:
            self.launcher = subprocess.Popen(command, stdout=file, stderr=file,
                                             env={**os.environ, "OMP_NUM_THREADS": "1"})

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(encoding="utf-8")

    def workers(self) -> dict[int, int]:
        """Return the process ids by rank."""
        pid, pids = self.launcher.pid, {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            pids |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
        return pids

    def wait_for(self, path: Path) -> None:
        """Wait until `path` exists."""
        while not path.exists():
            assert self.launcher.poll() is None, self.output()
            time.sleep(0.01)

    def ends(self, code: int | None = None) -> str:
        """Wait for the end and return the output; fail if it hangs, as a rank that waits for a lost one would."""
        try:
            self.launcher.wait(timeout=HANGS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {HANGS} s: {self.output()}") from None
        assert (self.launcher.returncode == code) if code is not None else self.launcher.returncode, self.output()
        return self.output()


def outcome(run: Path) -> dict[str, object]:
    """Return hashes and losses of the end of a run."""
    last = checkpoint.newest_intact(run)
    values = [(line["step"], line.get("train_loss"), line.get("val_loss")) for line in metrics.read_metrics(run)]
    return {"step": last.name, "metrics": values, "root": manifest.sha256(run / "model.safetensors"),
            **{name: manifest.sha256(last / name) for name in ("model.safetensors", "trainer.safetensors")}}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The outcome of an undisturbed run."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(["train", text, "--out", folder / "run", *SETTINGS], folder / "log")
    return outcome(folder / "run")


def resumed_from(output: str) -> int | None:
    """Return the step from which a finished command resumed."""
    step: int | None = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])["resumed_from"]
    return step


def rank(argv: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Run `bardlet ARGV`. Rank 1 is killed in its thirtieth update, but not after a restart."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    torch.set_num_threads(1)
    update, done = trainer.train_step, []

    def once(*args: Any) -> tuple[float, float]:
        done.append(1)
        if len(done) == 30 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    trainer.train_step = once  # type: ignore[assignment]
    if code := main(argv):
        sys.exit(code)


def test_torchrun_restarts_a_killed_run(text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """Rank 1 is killed after step 29: rank 0 names it, saves and exits; the two restarted ranks resume exactly.

    torchrun's launcher forks the ranks here: the imports of a new process take longer than the training.
    """
    run, log = tmp_path / "run", tmp_path / "log"
    config = LaunchConfig(1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1,
                          start_method="forkserver")
    environment = {name: value for name, value in os.environ.items() if name.startswith(("BARDLET_", "OMP_"))}
    elastic_launch(config, rank)(["train", str(text), "--out", str(run), *SETTINGS, "--json"], environment, str(log))
    output = log.read_text(encoding="utf-8")
    killed = r"bardlet: process 1 of 2 \(pid \d+ on .*\) was killed; torchrun restarts all processes"
    assert re.search(killed, output), output
    assert resumed_from(output) == 29
    assert outcome(run) == whole
