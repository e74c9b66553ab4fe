"""What a person sees: notices, progress on a terminal, plain lines when the output is piped."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Watch = Callable[[dict[str, Any]], None]


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # nobody listens any more: no reason to end a run
            print(f"note: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage(),
                  file=sys.stderr, flush=True)


def show_notices(main: bool = True) -> None:
    """Print what the library has to say (bardlet's logger) on standard error; only rank 0 speaks."""
    logger = logging.getLogger("bardlet")
    logger.handlers = [_Notices()] if main else [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def say(text: str = "") -> None:
    """A line on standard output, at once."""
    print(text, flush=True)


def say_json(value: dict[str, Any]) -> None:
    """`value` on one line, last: what `--json` promises."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def count(number: int, what: str) -> str:
    """`number` of `what` in words: 1 layer, 2 layers."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def clock_time(seconds: float) -> str:
    """75 -> '1:15'."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


@contextmanager
def preparation_progress(main: bool = True) -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A `progress(what, done, total)` for preparing a text: a bar on a terminal, a line per part when piped."""
    if not main:
        yield None
        return
    if not sys.stdout.isatty():
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
    """A `watch` for `fit`: a live bar with ETA, speed and both losses on a terminal, else a line now and then.

    unit: what a step counts.
    """
    if not sys.stdout.isatty():
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
            facts = _facts(line, smooth(line["train_loss"]), first, time.monotonic() - begun, unit)
            progress.update(task, completed=line["step"], total=line["steps"], facts=facts)

        yield watch


class _Smooth:
    """A running mean of the training loss over about the last 20 steps, for the eye."""

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, loss: float) -> float:
        if math.isfinite(loss):  # a skipped step says nothing
            self.value = loss if self.value is None else 0.95 * self.value + 0.05 * loss
        return loss if self.value is None else self.value


def _facts(line: dict[str, Any], train_loss: float, first: dict[str, Any], spent: float, unit: str) -> str:
    speed, left = "-", "-"  # nobody knows after one step
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
            say(_facts(line, train_loss, first, now - begun, unit))

    return watch


@contextmanager
def ladder_progress(expected: dict[Any, float]) -> Iterator[Callable[[str, Any, dict[str, Any]], None]]:
    """A `watch(title, job, line)` for several runs in turn: where the current one is, and when all will be done.

    Args:
        expected: about how many seconds each job takes, as far as is known before; what the jobs that are done
            really took corrects the rest.
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

    if not sys.stdout.isatty():
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
