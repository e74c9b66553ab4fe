"""Two processes, one of them killed at twenty points, stopped or faulty: both exit, and resume gives the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from processes import in_two_processes
from runtime.test_heartbeat import SETTINGS as FEW_STEPS
from runtime.test_heartbeat import Launch, outcome, resumed_from

from bardlet.run import checkpoint, metrics

SETTINGS = [*FEW_STEPS, "--steps", "400"]
"""Long enough that a random time of up to four seconds is within the run."""


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The outcome of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(["train", text, "--out", folder / "run", *SETTINGS], folder / "log")
    return outcome(folder / "run")


def gone(pids: dict[int, int]) -> bool:
    """Return True if none of these processes is left."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.parametrize("point", range(20))
def test_killed(point: int, text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """A message names the process, no process is left, and resume is exact. For odd points, torchrun restarts both."""
    run, chance = tmp_path / "run", random.Random(point)
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS, restarts=point % 2)
    launch.wait_for(run / "run.toml")
    pids, rank = launch.workers(), point // 2 % 2
    time.sleep(chance.uniform(0, 4))
    os.kill(pids[rank], signal.SIGKILL)
    saved = checkpoint.steps_saved(run)
    output = launch.ends(0) if point % 2 else launch.ends()
    named = re.search(rf"bardlet: process {rank} of 2 \(pid {pids[rank]} on .*\) was killed", output)
    # a process that had finished its part is named by torchrun, which stops the other one while it saves the end
    done = "stopped after step 400, and saved" in output and f"local_rank: {rank} (pid: {pids[rank]})" in output
    assert named or done, output
    assert gone(pids)
    if not point % 2:  # a run killed before its first checkpoint may leave no folder to resume
        again = ["resume", run] if run.exists() else ["train", text, "--out", run, *SETTINGS]
        assert run.exists() or not saved
        output = Launch(tmp_path / "again", *again).ends(0)
    assert (resumed_from(output) or 0) >= (int(saved[-1].name[5:]) if saved else 0), "it started over"
    assert outcome(run) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped(rank: int, text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """A stopped process (SIGSTOP) is named and killed; no process is left."""
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS)
    launch.wait_for(run / "checkpoints" / "step-00000020")
    pids = launch.workers()
    os.kill(pids[rank], signal.SIGSTOP)
    output = launch.ends()
    assert re.search(rf"bardlet: process {rank} of 2 \(pid {pids[rank]} on .*\) was stopped", output), output
    assert gone(pids)
    Launch(tmp_path / "again", "resume", run).ends(0)
    assert outcome(run) == whole


FAULTY = """
import os, sys
from bardlet.cli import main
from bardlet.training import losses, trainer

place, value, now = sys.argv.pop(1), float(sys.argv.pop(1)), [0]
seed_step, train_step, next_token_loss = trainer.seed_step, trainer.train_step, losses.next_token_loss


def record_step(seed, step, rank):
    now[0] = step
    seed_step(seed, step, rank)


def bad_loss(model, batch):
    if place == "gradient" and model.training and now[0] == 24:
        next(model.parameters()).register_hook(lambda g: g * value if now[0] == 24 else g)
    return next_token_loss(model, batch) * (value if place == "loss" and now[0] == 24 else 1)


def bad_weight(model, *args):
    result = train_step(model, *args)
    if place == "weight" and now[0] == 24:
        next(model.parameters()).data.view(-1)[0] = value
    return result


if os.environ["RANK"] == "1":
    trainer.seed_step, trainer.train_step, losses.next_token_loss = record_step, bad_weight, bad_loss
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", ["loss", "gradient", "weight"])
def test_non_finite_number_in_one_process(place: str, value: str, text: Path, tmp_path: Path) -> None:
    """Process 1 computes it in step 25: both stop in that step, name the process, and save nothing more."""
    run, program = tmp_path / "run", tmp_path / "faulty.py"
    program.write_text(FAULTY)
    output = Launch(tmp_path / "log", place, value, "train", text, "--out", run, *SETTINGS,
                    program=[str(program)]).ends()
    name = {"loss": "the loss", "gradient": "the gradient", "weight": "a weight"}[place]
    message = rf"bardlet: {name} of step 25 is not a finite number \(in process 1 of 2, epoch \d+, windows "
    assert re.search(message, output), output
    assert checkpoint.newest_intact(run).name == "step-00000020"
    assert max(line["step"] for line in metrics.read_metrics(run)) < 25


def test_restarted_processes_leave_an_existing_run_alone(text: Path, tmp_path: Path) -> None:
    """If --out already contains a run of another launcher, each attempt fails, and no byte of the run changes."""
    run = tmp_path / "run"
    Launch(tmp_path / "first", "train", text, "--out", run, *SETTINGS, "--steps", "2").ends(0)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    output = Launch(tmp_path / "second", "train", text, "--out", run, *SETTINGS, "--steps", "3", restarts=1).ends()
    assert output.count("already contains a run") == 4, output  # two processes, two attempts
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_signal_to_one_process_stops_all_and_saves(text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """After SIGTERM to rank 1 alone, all finish the step, rank 0 saves, and a resume gives the same bits."""
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS)
    launch.wait_for(run / "checkpoints" / "step-00000020")
    os.kill(launch.workers()[1], signal.SIGTERM)
    stopped = re.search(r"stopped after step (\d+), and saved", launch.ends())
    assert stopped and checkpoint.newest_intact(run).name == f"step-{int(stopped[1]):08}"
    assert resumed_from(Launch(tmp_path / "again", "resume", run).ends(0)) == int(stopped[1])
    assert outcome(run) == whole
