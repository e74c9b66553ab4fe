"""A busy machine: how it is noticed, and what follows from it. Nothing here is timed."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock

from bardlet.cli import main
from bardlet.planning import calibrate
from bardlet.planning import clock as planning_clock
from bardlet.runtime import contention
from bardlet.runtime.distributed import Dist

CPU = Dist(0, 1, torch.device("cpu"))
CALIBRATE = calibrate.calibrate


def threads(folder: Path, *figures: tuple[int, int]) -> Path:
    """Write a /proc/self/task with (nanoseconds on a core, nanoseconds in the queue) for each thread."""
    for number, (ran, waited) in enumerate(figures):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "schedstat").write_text(f"{ran} {waited} 7\n")
    return folder


@pytest.fixture
def real_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the quiet machine that all tests see."""
    monkeypatch.undo()


@pytest.mark.usefixtures("real_factor")
@pytest.mark.parametrize(("figures", "expected"), [
    ([(100, 0)], 1.0), ([(100, 20)], 1.0), ([(100, 300)], 4.0), ([(100, 0), (100, 300)], 2.5)])
def test_the_slowdown_is_what_the_scheduler_counted(figures: Sequence[tuple[int, int]], expected: float,
                                                    tmp_path: Path) -> None:
    """Waiting below a quarter of the running time is a quiet machine: there, nothing may change."""
    folder = threads(tmp_path / "task", *figures)
    (folder / "9").mkdir()  # a thread that ended meanwhile
    assert contention.slowdown(folder) == expected


@pytest.mark.usefixtures("real_factor")
def test_without_the_scheduler_it_is_the_load_per_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 1.0, 1.0))
    assert contention.slowdown(tmp_path / "absent") == 4.5
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 1.0, 1.0))
    assert contention.slowdown(tmp_path / "absent") == 1.0


def run_queue(monkeypatch: pytest.MonkeyPatch, file: Path, running: Sequence[int]) -> Path:
    """Let each wait be followed by the next length of the run queue; the last one stays."""
    lengths = list(running)

    def sleep(seconds: float) -> None:
        file.write_text(f"0.50 0.40 0.30 {lengths.pop(0) if len(lengths) > 1 else lengths[0]}/90 1234\n")

    monkeypatch.setattr(contention.time, "sleep", sleep)
    return file


@pytest.mark.parametrize(("running", "taken"), [
    ([1], False), ([2], True), ([9], True), ([2, 2, 1, 9], False),  # a glance shows a free core
    ([2, 2, 2, 2, 2, 1], False)])  # a program that just ended
def test_cores_are_taken_if_the_run_queue_stays_long(running: Sequence[int], taken: bool, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)))
    assert contention.cores_are_taken(run_queue(monkeypatch, tmp_path / "loadavg", running)) == taken


def test_cores_that_this_process_may_not_use_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with some of a large machine's cores, the queue is that of the whole machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)) + 60)
    assert not contention.cores_are_taken(run_queue(monkeypatch, tmp_path / "loadavg", [40]))
    assert contention.cores_are_taken(run_queue(monkeypatch, tmp_path / "loadavg", [80]))
    assert not contention.cores_are_taken(tmp_path / "absent")


@pytest.mark.parametrize(("taken", "before", "after"), [
    (False, {}, {"GOMP_SPINCOUNT": "2000"}), (True, {}, {"OMP_WAIT_POLICY": "passive"}),
    (True, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"})])
def test_threads_sleep_on_a_busy_machine(taken: bool, before: dict[str, str], after: dict[str, str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.setenv(name, "")  # so that the variable is restored
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(contention, "cores_are_taken", lambda: taken)
    contention.choose_waiting()
    assert not before or os.environ["GOMP_SPINCOUNT"] == before["GOMP_SPINCOUNT"], "too late: torch is loaded"
    monkeypatch.delitem(sys.modules, "torch")
    contention.choose_waiting()
    assert {name: os.environ[name] for name in names if name in os.environ} == after


@pytest.mark.parametrize(("factor", "kept"), [(1.0, 1.2), (2.0, 1.5), (5.0, 2.4), (50.0, 6.0)])
def test_the_end_of_a_run_takes_longer_on_a_busy_machine(factor: float, kept: float) -> None:
    """Two percent, three tenths of a second more per factor, and never more than a tenth of a minute."""
    assert planning_clock.reserve(60.0, factor) == pytest.approx(kept)
    assert planning_clock.steps_for(60.0, 0.1, 3.0, factor) == int((57 - kept) / 0.1)


def test_compiling_is_dearer_on_a_busy_machine() -> None:
    """Eight minutes are worth 40 seconds, but not the 200 seconds that they become; nor are two minutes."""
    assert calibrate.worth_compiling(480.0) and not calibrate.worth_compiling(480.0, 5 * calibrate.COLD)
    assert not calibrate.worth_compiling(120.0) and calibrate.worth_compiling(120.0, calibrate.WARM)


def test_cached_speeds_are_scaled_on_a_busy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large models need not be timed again, and what a busy machine does is not remembered."""
    pace, calls = 1.0, []

    def timed(shape: tuple[int, int, int], dist: Any, dtype: str) -> tuple[float, float]:
        calls.append(shape)
        return shape[2] * 1e5, shape[2] * 1e-7 * pace

    monkeypatch.setattr(calibrate, "_time_model", timed)
    quiet = calibrate.calibrate(CPU, "fp32", 1, tmp_path)
    monkeypatch.setattr(contention, "_factor", lambda tasks: 5.0)
    pace = 5.0
    calls.clear()
    busy = calibrate.calibrate(CPU, "fp32", 1, tmp_path)
    assert len(calls) == 1 and [y for _, y in busy.points] == pytest.approx([5 * y for _, y in quiet.points])
    assert len(calibrate.calibrate(CPU, "fp32", 1, tmp_path / "new").points) == len(calibrate.TIMED_SHAPES)
    assert not (tmp_path / "new" / "machines").exists()
    monkeypatch.setattr(contention, "_factor", lambda tasks: 1.0)
    pace = 1.0
    assert calibrate.calibrate(CPU, "fp32", 1, tmp_path) == quiet


@pytest.mark.parametrize("seconds", [60.0, 120.0])
@pytest.mark.parametrize("per_step", [0.01, 0.1, 0.5, 1.5])
def test_calibration_takes_at_most_a_tenth_of_the_minutes(seconds: float, per_step: float, tmp_path: Path,
                                                          clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, until two steps of the smallest model alone take longer."""
    monkeypatch.setattr(calibrate, "TIMED_SHAPES", ((1, 1, 8), (1, 1, 16), (1, 1, 32)))  # the clock counts steps only
    clock.per_step = per_step
    before = clock.now
    CALIBRATE(CPU, "fp32", 1, tmp_path, seconds)
    assert clock.now - before <= 0.1 * seconds


def test_a_busy_machine_is_said(text: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    clock.per_step = 0.2
    monkeypatch.setattr(contention, "_factor", lambda tasks: 4.5)
    assert main(["train", str(text), "--minutes", "0.05", "--out", str(tmp_path / "run")]) == 0
    assert ("this machine is busy: other programs use its cores, so everything takes about 4.5 times as long; close "
            "them, or give more --minutes") in capsys.readouterr().err


def test_a_base_on_a_slow_machine_gets_smaller_batches(text: Path, tmp_path: Path, clock: Clock,
                                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """At two seconds a step of 32 windows, a minute has 30 steps: windows are halved until there is time for 100."""

    long = tmp_path / "long.txt"
    long.write_text(text.read_text(encoding="utf-8") * (120_000 // text.stat().st_size), encoding="utf-8")
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--compile", "off"]
    bardlet("train", text, *shape, "--steps", "2", "--out", tmp_path / "base")
    clock.per_step = 2.0
    for extra, batch in (([], 8), (["--batch-size", "16"], 16)):
        bardlet("train", long, "--init", tmp_path / "base", "--minutes", "1", *extra, "--out",
                tmp_path / f"new-{batch}")
        with open(tmp_path / f"new-{batch}" / "run.toml", "rb") as file:
            assert tomllib.load(file)["batch_size"] == batch
