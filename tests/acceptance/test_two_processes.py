"""Two processes: one is killed at twenty points of a run, one is stopped; nothing stays, and the bits stay the same."""

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
"""Long enough that a random time of up to four seconds lies within the run."""


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The outcome of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(["train", text, "--out", folder / "run", *SETTINGS], folder / "log")
    return outcome(folder / "run")


def gone(pids: dict[int, int]) -> bool:
    """Whether none of these processes is left."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.parametrize("point", range(20))
def test_killed(point: int, text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """Nothing is left, and the one at fault was named; two that are started then go on exactly.

    Half of the points lie where torchrun starts them again by itself.
    """
    run, chance = tmp_path / "run", random.Random(point)
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS, restarts=point % 2)
    launch.wait_for(run / "run.toml")
    pids, rank = launch.workers(), point // 2 % 2
    time.sleep(chance.uniform(0, 4))
    os.kill(pids[rank], signal.SIGKILL)
    saved = checkpoint.steps_saved(run)
    said = launch.ends(0) if point % 2 else launch.ends()
    named = re.search(rf"bardlet: process {rank} of 2 \(pid {pids[rank]} on .*\) was killed", said)
    # one that had done its part already is named by torchrun, which asks the other, who is writing the end, to stop
    done = "stopped after step 400, and saved" in said and f"local_rank: {rank} (pid: {pids[rank]})" in said
    assert named or done, said
    assert gone(pids)
    if not point % 2:  # what was killed before its first checkpoint has left nothing to go on from
        again = ["resume", run] if run.exists() else ["train", text, "--out", run, *SETTINGS]
        assert run.exists() or not saved
        said = Launch(tmp_path / "again", *again).ends(0)
    assert (resumed_from(said) or 0) >= (int(saved[-1].name[5:]) if saved else 0), "it began again"
    assert outcome(run) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped(rank: int, text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """One that was stopped (SIGSTOP) is named and ended, too: nothing is left."""
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS)
    launch.wait_for(run / "checkpoints" / "step-00000020")
    pids = launch.workers()
    os.kill(pids[rank], signal.SIGSTOP)
    said = launch.ends()
    assert re.search(rf"bardlet: process {rank} of 2 \(pid {pids[rank]} on .*\) was stopped", said), said
    assert gone(pids)
    Launch(tmp_path / "again", "resume", run).ends(0)
    assert outcome(run) == whole


BROKEN = """
import os, sys
from bardlet.cli import main
from bardlet.training import losses, trainer

place, value, now = sys.argv.pop(1), float(sys.argv.pop(1)), [0]
seed_step, train_step, next_token = trainer.seed_step, trainer.train_step, losses.next_token


def noted(seed, step, rank):
    now[0] = step
    seed_step(seed, step, rank)


def bad_loss(model, batch):
    if place == "gradient" and model.training and now[0] == 24:
        next(model.parameters()).register_hook(lambda g: g * value if now[0] == 24 else g)
    return next_token(model, batch) * (value if place == "loss" and now[0] == 24 else 1)


def bad_weight(model, *args):
    found = train_step(model, *args)
    if place == "weight" and now[0] == 24:
        next(model.parameters()).data.view(-1)[0] = value
    return found


if os.environ["RANK"] == "1":
    trainer.seed_step, trainer.train_step, losses.next_token = noted, bad_weight, bad_loss
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", ["loss", "gradient", "weight"])
def test_a_bad_number_in_one_of_them(place: str, value: str, text: Path, tmp_path: Path) -> None:
    """In step 25, in process 1: both stop in that step, name it, and save nothing more."""
    run, program = tmp_path / "run", tmp_path / "broken.py"
    program.write_text(BROKEN)
    said = Launch(tmp_path / "log", place, value, "train", text, "--out", run, *SETTINGS,
                  program=[str(program)]).ends()
    what = {"loss": "the loss", "gradient": "the gradient", "weight": "a weight"}[place]
    assert re.search(rf"bardlet: {what} of step 25 is not a finite number \(in process 1 of 2, windows ", said), said
    assert checkpoint.newest_whole(run).name == "step-00000020"
    assert max(line["step"] for line in metrics.read_metrics(run)) < 25


def test_processes_that_are_started_again_leave_the_run_of_another_launcher_alone(text: Path, tmp_path: Path) -> None:
    """--out names a run that is there already: an error in each attempt, and not a byte of it changes."""
    run = tmp_path / "run"
    Launch(tmp_path / "first", "train", text, "--out", run, *SETTINGS, "--steps", "2").ends(0)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = Launch(tmp_path / "second", "train", text, "--out", run, *SETTINGS, "--steps", "3", restarts=1).ends()
    assert said.count("already contains a run") == 4, said  # two processes, twice
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_signal_to_any_of_them_stops_all_and_saves(text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """SIGTERM to rank 1 alone: all finish the step, rank 0 saves, and resume ends with the same bits."""
    run = tmp_path / "run"
    launch = Launch(tmp_path / "log", "train", text, "--out", run, *SETTINGS)
    launch.wait_for(run / "checkpoints" / "step-00000020")
    os.kill(launch.workers()[1], signal.SIGTERM)
    stopped = re.search(r"stopped after step (\d+), and saved", launch.ends())
    assert stopped and checkpoint.newest_whole(run).name == f"step-{int(stopped[1]):08}"
    assert resumed_from(Launch(tmp_path / "again", "resume", run).ends(0)) == int(stopped[1])
    assert outcome(run) == whole
