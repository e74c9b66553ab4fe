"""Notices and progress: a live bar on a terminal or in a notebook, plain lines when the output is piped."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

Watch = Callable[[dict[str, Any]], None]


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # standard error is closed: no reason to stop a run
            print(f"note: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage(),
                  file=sys.stderr, flush=True)


def show_notices(main: bool = True) -> None:
    """Print the messages of bardlet's logger to standard error, on rank 0 only."""
    logger = logging.getLogger("bardlet")
    logger.handlers = [_Notices()] if main else [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def say(text: str = "") -> None:
    """Print a line to standard output and flush it."""
    print(text, flush=True)


def say_json(value: dict[str, Any]) -> None:
    """Print `value` as JSON on one line, the last line of a command with --json."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def main_rank() -> bool:
    """Return True on rank 0, before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def live() -> bool:
    """Return True if standard output can show a progress bar: a terminal, or a notebook that has ipywidgets."""
    notebook = type(sys.stdout).__module__.startswith("ipykernel")
    return sys.stdout.isatty() or (notebook and find_spec("ipywidgets") is not None)


def count(number: int, what: str) -> str:
    """Return a number with its noun: 1 layer, 2 layers."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def clock_time(seconds: float) -> str:
    """Return seconds as minutes and seconds: 75 -> '1:15'."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


@contextmanager
def preparation_progress(main: bool = True) -> Iterator[Callable[[str, int, int | None], None] | None]:
    """Yield `progress(what, done, total)` for reading and tokenizing a text; None on other ranks.

    On a terminal it is a bar; in a pipe a line per part, such as "reading my.txt".
    """
    if not main:
        yield None
        return
    if not live():
        seen: set[str] = set()

        def line(what: str, done: int, total: int | None) -> None:
            if what not in seen:
                seen.add(what)
                say(what)

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def bar(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield bar


@contextmanager
def training_progress(unit: str = "tokens") -> Iterator[Watch]:
    """Yield a `watch` for `fit`: a live bar with losses, speed and ETA, or in a pipe a line every 10 seconds.

    unit: what the speed counts.
    """
    if not live():
        yield _lines(unit)
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[facts]}"))
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=None, facts="")
        begun, smooth, first = time.monotonic(), _Smooth(), None

        def watch(line: dict[str, Any]) -> None:
            nonlocal first
            first = line if first is None else first
            facts = _progress_text(line, smooth(line["train_loss"]), first, time.monotonic() - begun, unit)
            progress.update(task, completed=line["step"], total=line["steps"], facts=facts)

        yield watch


class _Smooth:
    """Running mean of the training loss over about the last 20 steps, for display."""

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, loss: float) -> float:
        if math.isfinite(loss):  # skipped steps have no loss
            self.value = loss if self.value is None else 0.95 * self.value + 0.05 * loss
        return loss if self.value is None else self.value


def _progress_text(line: dict[str, Any], train_loss: float, first: dict[str, Any], spent: float, unit: str) -> str:
    """Return step, losses, speed and ETA as text.

    The held-out reward and the KL of reinforcement learning are measured once per rollout or evaluation, not per step.
    """
    speed, left = "-", "-"  # unknown after one step
    if steps := line["step"] - first["step"]:
        speed = f"{(line['tokens'] - first['tokens']) / max(line['seconds'] - first['seconds'], 1e-9):,.0f}"
        left = clock_time((line["steps"] - line["step"]) * spent / steps)
    val = f"{line['val_loss']:.4f}" if line["val_loss"] is not None else "-"
    what = f"train {train_loss:.4f}  val {val}"
    if "reward" in line:
        held = "-" if line["val_loss"] is None else f"{-line['val_loss']:.4f}"
        what = f"reward {line['reward']:.4f}  held out {held}  KL {line['kl']:.2f}"
    return f"step {line['step']:>5}/{line['steps']}  {what}  {speed:>7} {unit}/s  ETA {left}"


def _lines(unit: str) -> Watch:
    begun, smooth = time.monotonic(), _Smooth()
    first: dict[str, Any] | None = None
    said, val = begun, None

    def watch(line: dict[str, Any]) -> None:
        nonlocal first, said, val
        first = line if first is None else first
        train_loss, now = smooth(line["train_loss"]), time.monotonic()
        if line["step"] == line["steps"] or line["val_loss"] != val or now - said > 10:
            said, val = now, line["val_loss"]
            say(_progress_text(line, train_loss, first, now - begun, unit))

    return watch


@contextmanager
def ladder_progress(expected: dict[Any, float]) -> Iterator[Callable[[str, Any, dict[str, Any]], None]]:
    """Yield a `watch(title, job, line)` for several runs in turn: progress of the current run, and the ETA of all.

    Args:
        expected: estimated seconds of each job. The measured time of finished jobs corrects the ETA.
    """
    begun, smooth, said = time.monotonic(), _Smooth(), 0.0
    done: list[Any] = []

    def facts(title: str, job: Any, line: dict[str, Any]) -> tuple[float, str]:
        nonlocal smooth
        if job not in done:
            done.append(job)
            smooth = _Smooth()
        part = line["step"] / line["steps"]
        past = sum(expected.get(one, 0.0) for one in done[:-1]) + part * expected.get(job, 0.0)
        share = past / (sum(expected.values()) or 1.0)
        spent = time.monotonic() - begun
        left = f"  ETA {clock_time(spent / share - spent)}" if share > 0.005 else ""
        val = f"{line['val_loss']:.4f}" if line["val_loss"] is not None else "-"
        return share, (f"rung {title}: step {line['step']:>5}/{line['steps']}  train {smooth(line['train_loss']):.4f}  "
                       f"val {val}  whole ladder {share:4.0%}{left}")

    if not live():
        def lines(title: str, job: Any, line: dict[str, Any]) -> None:
            nonlocal said
            text = facts(title, job, line)[1]
            if time.monotonic() - said > 10:
                said = time.monotonic()
                say(text)

        yield lines
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(bar_width=20), TextColumn("{task.fields[facts]}")) as progress:
        task = progress.add_task("ladder", total=1.0, facts="")

        def bar(title: str, job: Any, line: dict[str, Any]) -> None:
            share, text = facts(title, job, line)
            progress.update(task, completed=share, facts=text)

        yield bar
