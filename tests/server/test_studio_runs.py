"""The runs and jobs of the studio: curves, the table, deleting, and processes that outlive the server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bardlet
from bardlet.cli import main
from bardlet.run import lock, metrics
from bardlet.run.metrics import append_metrics, read_metrics
from bardlet.server.errors import Refusal
from bardlet.server.studio.curves import POINTS, Curve, Line
from bardlet.server.studio.jobs import ID, Job, Jobs
from bardlet.server.studio.runs import Runs

HANGS = 300
"""Seconds after which a job counts as hanging: no machine is that slow."""

# ---------------------------------------------------------------- curves


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(-1e3, 1e3)), max_size=60), st.integers(3, 20))
def test_thinning(points: list[tuple[int, float]], most: int) -> None:
    """The ends stay, the steps ascend, there are at most `most` points, and their values are means."""
    line = Line()
    for step, value in points:
        line.add(step, value)
    thin = line.thinned(most)
    assert [step for step, _ in thin] == sorted({step for step, _ in thin}) and len(thin) <= most
    if points:
        assert thin[0] == (line.steps[0], line.values[0]) and thin[-1] == (line.steps[-1], line.values[-1])
        assert all(min(line.values) - 1e-9 <= value <= max(line.values) + 1e-9 for _, value in thin)


def test_a_curve_is_read_on(tmp_path: Path) -> None:
    """After each line, and in the middle of one, it is what the whole file says."""
    whole = Curve(tmp_path)
    whole.read()
    assert whole.points("val_loss") == {} and whole.step == 0
    for step in range(1, 40):
        append_metrics(tmp_path, {"step": step, "val_loss" if step % 3 else "train_loss": 1 / step})
    data = (tmp_path / "metrics.jsonl").read_bytes()
    curve = Curve(tmp_path)
    for stop in range(0, len(data), 37):
        (tmp_path / "metrics.jsonl").write_bytes(data[:stop])
        curve.read()
        lines = read_metrics(tmp_path)
        for name in ("val_loss", "train_loss"):
            assert curve.points(name).get(name, []) == [(line["step"], line[name]) for line in lines if name in line]


def test_a_curve_that_was_cut_or_damaged(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        append_metrics(tmp_path, {"step": step, "train_loss": float(step)})
    curve = Curve(tmp_path)
    curve.read()
    metrics.cut_metrics(tmp_path, 20)
    curve.read()
    assert curve.points("train_loss") == {"train_loss": [(10, 10.0), (20, 20.0)]}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "train_loss": 1e9}\nrubbish\n')
    append_metrics(tmp_path, {"step": 30, "train_loss": 3.0})
    append_metrics(tmp_path, {"step": 25, "train_loss": 2.5})  # a resumed run writes steps again
    curve.read()
    assert curve.points("train_loss") == {"train_loss": [(10, 10.0), (20, 20.0), (25, 2.5)]}
    assert curve.last == {"step": 25, "train_loss": 2.5}


def test_a_long_curve_has_few_points() -> None:
    line = Line()
    for step in range(100_000):
        line.add(step, 1.0)
    assert POINTS / 2 < len(line.thinned()) <= POINTS


# ---------------------------------------------------------------- runs


@pytest.fixture
def runs(run: Path, tmp_path: Path) -> Runs:
    """A folder with a copy of a trained run, alone and in a folder."""
    for name in ("one", "ladder/two"):
        shutil.copytree(run, tmp_path / "runs" / name)
    return Runs(tmp_path / "runs", tmp_path / "runs" / ".studio")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text("the bards of a village sang about rivers and kings. " * 200)
    assert main(["train", str(folder / "a.txt"), "--out", str(folder / "run"), "--steps", "6", "--n-layer", "1",
                 "--n-head", "1", "--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--eval-every", "2",
                 "--log-every", "1", "--sample-tokens", "8", "--compile", "off"]) == 0
    return folder / "run"


def test_the_table(runs: Runs) -> None:
    assert {row["name"] for row in runs.table()} == {"one", "ladder/two"}
    assert runs.row(runs.folder("one")) is runs.row(runs.folder("one"))
    progress = runs.progress("one")
    lines = read_metrics(runs.folder("one"))
    assert progress["points"]["val_loss"] == [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert progress["points"]["train_loss"][-1][0] == progress["step"] == progress["planned"] == 6
    assert [sample["step"] for sample in progress["samples"]] == [2, 4, 6]
    assert "points" not in runs.progress("one", progress["version"])
    details = runs.details("one")
    assert details["settings"]["text"] == ["a.txt"] and details["record"]["finished"] is True
    assert str(runs.root) not in json.dumps(details["settings"])
    assert details["meanings"]["n_layer"] == "Transformer blocks" and "Time budget" in details["meanings"]["minutes"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "one/..", "one/", "/one", "one\0", "no", ".studio", "ladder",
                                  "one/../one", "link", "one\\x", "a/b/c/d"])
def test_only_runs_have_a_folder(runs: Runs, name: str) -> None:
    (runs.root / "link").symlink_to(runs.root / "one")
    with pytest.raises(Refusal):
        runs.folder(name)


def test_deleting_and_undo(runs: Runs) -> None:
    for name in ("one", "ladder/two"):
        before = sorted(path.name for path in runs.folder(name).iterdir())
        kept = runs.delete(name)
        assert name not in {row["name"] for row in runs.table()} and runs.deleted() == [kept]
        assert len(bardlet.runs(runs.root)) == 1  # `bardlet runs` does not list the deleted one either
        assert runs.restore(kept) == name and runs.deleted() == []
        assert sorted(path.name for path in runs.folder(name).iterdir()) == before
    with pytest.raises(Refusal):
        runs.restore("../one")
    kept = runs.delete("one")
    (runs.root / "one").mkdir()
    with pytest.raises(Refusal, match="new run"):
        runs.restore(kept)


def test_a_deleted_run_comes_back_under_its_own_name(runs: Runs) -> None:
    for name in ("a~b", "a%2Fb", "ladder/a b"):
        shutil.copytree(runs.root / "one", runs.root / name)
        assert runs.restore(runs.delete(name)) == name and runs.has(name)


def test_figures_that_are_no_numbers_are_no_points(tmp_path: Path) -> None:
    for step, value in ((1, 2.0), (2, float("nan")), (3, float("inf"))):
        append_metrics(tmp_path, {"step": step, "train_loss": value})
    curve = Curve(tmp_path)
    curve.read()
    assert curve.points("train_loss") == {"train_loss": [(1, 2.0)]}


def test_a_run_in_use_is_not_deleted(runs: Runs) -> None:
    with lock.locked(runs.folder("one")), pytest.raises(Exception, match="in use"):
        runs.delete("one")
    assert runs.folder("one").is_dir()


def test_samples_change_no_weight(run: Path, tmp_path: Path) -> None:
    """A run that writes samples has the weights and losses of one that does not, also after a resume."""
    text = str(run.parent / "a.txt")
    argv = ["train", text, "--out", str(tmp_path / "plain"), "--config", str(run / "run.toml"), "--sample-tokens", "0"]
    assert main(argv) == 0
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert [line for line in read_metrics(run) if "val_loss" in line] == [
        line for line in read_metrics(tmp_path / "plain") if "val_loss" in line]
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


# ---------------------------------------------------------------- jobs


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs", tmp_path)


def until(jobs: Jobs, job: Job, good: Callable[[Job], bool]) -> Job:
    """Return the job when it is as it should be."""
    end = time.monotonic() + HANGS
    while not good(now := jobs.get(job.id)):
        assert time.monotonic() < end, now
        jobs.start_next()
        time.sleep(0.05)
    return now


def ended(job: Job) -> bool:
    return job.state not in ("waiting", "running")


def test_jobs_run_in_turn_and_say_how_they_ended(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    good, bad, gone = (jobs.add(words, "x", "text") for words in (["runs"], ["runs", "no-such-run"], ["runs"]))
    assert [job.id for job in jobs.all()] == [gone.id, bad.id, good.id]
    assert all(ID.fullmatch(job.id) for job in jobs.all())
    assert jobs.stop(gone.id).state == "stopped"
    assert until(jobs, bad, ended).state == "failed"
    assert jobs.get(good.id).state == "done" and jobs.get(good.id).code == 0
    assert "not a run folder" in jobs.get(bad.id).message and "no runs yet" in jobs.log(good.id)
    again = Jobs(jobs.folder, tmp_path)
    assert [job.state for job in again.all()] == ["stopped", "failed", "done"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_job_outlives_the_server(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server finds its process, stops it, and notices that it was killed. A second one waits meanwhile."""
    endless = ["serve", "--port", "0"]
    stopped, killed = (jobs.add(endless, "x", "text") for _ in range(2))
    until(jobs, stopped, lambda job: "serving" in jobs.log(job.id))
    other = Jobs(jobs.folder, tmp_path)
    other.start_next()
    assert [job.state for job in other.all()] == ["waiting", "running"]
    signals: list[int] = []
    real = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, sent: (signals.append(sent), real(pid, sent)))
    other.stop(stopped.id)
    other.stop(stopped.id)
    assert [sent for sent in signals if sent] == [signal.SIGTERM], "a second signal would end it without saving"
    monkeypatch.setattr(os, "kill", real)
    assert until(jobs, stopped, ended).state == "stopped"
    until(jobs, killed, lambda job: "serving" in jobs.log(job.id))
    other = Jobs(jobs.folder, tmp_path)
    process = other._process(killed.id)
    assert process is not None
    os.kill(process, signal.SIGKILL)
    until(jobs, killed, ended)
    assert Jobs(jobs.folder, tmp_path).get(killed.id).state == "interrupted"
