"""Notices and progress: a live bar on a terminal or in a notebook, plain lines when the output is piped."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from bardlet.errors import neutral

Watch = Callable[[dict[str, Any]], None]

ESCAPED = {code: f"\\u{code:04x}" for code in range(127, 160)}
"""The control characters that JSON does not escape by itself."""


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # standard error is closed: no reason to stop a run
            message = neutral(record.getMessage())  # names of files and fields are other people's text
            print(f"note: {message}" if record.levelno >= logging.WARNING else message, file=sys.stderr, flush=True)


def show_notices(main: bool = True) -> None:
    """Print the messages of bardlet's logger to standard error, on rank 0 only."""
    logger = logging.getLogger("bardlet")
    logger.handlers = [_Notices()] if main else [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def say(text: str = "") -> None:
    """Print a line to standard output and flush it; on a terminal, without control characters."""
    print(shown(text), flush=True)


def shown(text: str) -> str:
    """Return a model's text for standard output: on a terminal, without control characters."""
    return neutral(text) if sys.stdout.isatty() else text


def say_json(value: dict[str, Any]) -> None:
    """Print `value` as JSON on one line, the last line of a command with --json. Control characters are escaped."""
    print(json.dumps(value, ensure_ascii=False).translate(ESCAPED), flush=True)


def main_rank() -> bool:
    """Return True on rank 0, before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def live() -> bool:
    """Return True if standard output can show a progress bar: a terminal, or a notebook that has ipywidgets."""
    return sys.stdout.isatty() or (in_notebook() and find_spec("ipywidgets") is not None)


def in_notebook() -> bool:
    """Return True if standard output is a notebook's."""
    return type(sys.stdout).__module__.startswith("ipykernel")


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 layer, 2 layers."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def minutes(number: float) -> str:
    """Return a number of minutes: 1 minute, 2.5 minutes."""
    return f"{number:g} minute{'s' * (number != 1)}"


def listing(names: Sequence[str], most: int = 3) -> str:
    """Return names as part of a sentence: a.txt, b.txt, c.txt and 2 more."""
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)


def duration(seconds: float) -> str:
    """Return a rough time: about 7 s, about 40 s, about 1.5 minutes."""
    if seconds < 95:
        return f"about {max(1, round(seconds)) if seconds < 10 else 10 * round(seconds / 10)} s"
    return f"about {minutes(round(seconds / 30) / 2 if seconds < 285 else round(seconds / 60))}"


def clock_time(seconds: float) -> str:
    """Return seconds as minutes and seconds: 75 -> '1:15'."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


@contextmanager
def preparation_progress(main: bool = True) -> Iterator[Callable[[str, int, int | None], None] | None]:
    """Yield `progress(task, done, total)` for reading and tokenizing a text; None on other ranks.

    On a terminal it is a bar; in a pipe a line per task, such as "measuring my.txt".
    """
    if not main:
        yield None
        return
    if not live():
        seen: set[str] = set()

        def line(task: str, done: int, total: int | None) -> None:
            if task not in seen:
                seen.add(task)
                say(task)

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    with Progress(description, BarColumn(), TimeRemainingColumn(), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def bar(task: str, done: int, total: int | None) -> None:
            if task not in tasks:
                tasks[task] = progress.add_task(neutral(task), total=total)
            progress.update(tasks[task], completed=done, total=total)

        yield bar


@contextmanager
def training_progress(unit: str = "tokens", budget: float | None = None) -> Iterator[Watch]:
    """Yield a `watch` for `fit`: a live bar with losses, speed and ETA, or in a pipe a line every 10 seconds.

    In a notebook, the curve grows below the bar.

    Args:
        unit: the unit of the speed.
        budget: seconds of a timed run, which may change its number of steps.
    """
    if in_notebook():
        yield _inline(unit, budget)
        return
    if not live():
        yield _lines(unit, budget)
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(bar_width=None), TextColumn("{task.fields[facts]}")) as progress:
        task = progress.add_task("training", total=None, facts="")
        text = StepText(unit, budget)

        def watch(line: dict[str, Any]) -> None:
            facts = shorten(text(line), progress.console.width, r" \(step \d+\)", rf" +[\d,]+ {unit}/s")
            progress.update(task, completed=line["step"], total=line["steps"], facts=facts)

        yield watch


def shorten(text: str, width: int, *less_important: str) -> str:
    """Return a text that leaves space for a small bar, without the parts that match the first patterns if need be."""
    for pattern in less_important:
        if len(text) + 6 > width:
            text = re.sub(pattern, "", text)
    return text


class _Smooth:
    """Running mean of the training loss over about the last 20 steps, for display."""

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, loss: float) -> float:
        if math.isfinite(loss):  # skipped steps have no loss
            self.value = loss if self.value is None else 0.95 * self.value + 0.05 * loss
        return loss if self.value is None else self.value


STEADY = 0.3
"""Share of the time of a timed run after which its number of planned steps is shown: the first plans come from a few
steps, and may be off by half."""


class StepText:
    """The text of a step: losses, speed and ETA. unit: the unit of the speed. budget: seconds of a timed run.

    Evaluations have the validation loss or the held-out reward, rollouts have reward and KL: a figure of an earlier
    step names that step. A timed run may plan other steps later, so their number is hidden until it is STEADY and
    approximate until the last one, and the run ends within its budget.
    """

    def __init__(self, unit: str, budget: float | None = None) -> None:
        self.unit, self.budget, self.smooth, self.started = unit, budget, _Smooth(), time.monotonic()
        self.first: dict[str, Any] | None = None
        self.measured: dict[str, tuple[float, int]] = {}

    def __call__(self, line: dict[str, Any]) -> str:
        """Return the text for a line of metrics.jsonl."""
        self.first = first = self.first or line
        step, train_loss = line["step"], self.smooth(line["train_loss"])
        pace = ""  # unknown after one step
        if steps := step - first["step"]:
            speed = (line["tokens"] - first["tokens"]) / max(line["seconds"] - first["seconds"], 1e-9)
            left = (line["steps"] - step) * (time.monotonic() - self.started) / steps
            ends = f"ETA {clock_time(left)}"
            if self.budget is not None and step < line["steps"]:
                rest = self.budget - line["elapsed"]  # past it, the clock plans fewer steps
                ends = f"ETA {clock_time(min(left, rest))}" if rest > 0 else "ends soon"
            pace = f"  {speed:>7,.0f} {self.unit}/s  {ends}"
        loss = line["val_loss"]
        figures = "".join((f"  train {train_loss:z.4f}", self._dated("val", loss, step),
                           self._dated("old text", line.get("old_val_loss"), step)))
        if "reward" in line:
            held_out = None if loss is None else -loss
            figures = "".join(self._dated(name, value, step) for name, value in
                              (("reward", line["reward"]), ("held-out reward", held_out), ("KL", line["kl"])))
        total = f"/{line['steps']}"
        if self.budget is not None:
            last = step == line["steps"]
            steady = last or line["elapsed"] >= STEADY * self.budget
            total = f" of {'about ' * (not last)}{line['steps']}" * steady
        return f"step {step:>5}{total}{figures}{pace}"

    def _dated(self, name: str, value: float | None, step: int) -> str:
        """Return a figure with its name, and with the step at which it was measured if that is an earlier one."""
        if value is None:
            return ""
        if name not in self.measured or self.measured[name][0] != value:
            self.measured[name] = value, step
        measured_at = self.measured[name][1]
        return f"  {name} {value:z.4f}" + (f" (step {measured_at})" if measured_at != step else "")


def _lines(unit: str, budget: float | None = None) -> Watch:
    text, printed, val = StepText(unit, budget), time.monotonic(), None

    def watch(line: dict[str, Any]) -> None:
        nonlocal printed, val
        step, now = text(line), time.monotonic()
        if line["step"] == line["steps"] or line["val_loss"] != val or now - printed > 10:
            printed, val = now, line["val_loss"]
            say(step)

    return watch


PAINT = {"train": "#9db4c8", "reward": "#9db4c8", "val": "#c0392b"}
"""The colors of the curves in a notebook."""


def _inline(unit: str, budget: float | None = None) -> Watch:
    """Return a `watch` for a notebook: a bar, the text of the step and the curve so far, drawn twice a second."""
    from IPython.display import display

    text, drawn, val, handle = StepText(unit, budget), 0.0, None, None
    points: dict[str, list[tuple[int, float]]] = {}

    def watch(line: dict[str, Any]) -> None:
        nonlocal drawn, val, handle
        shown, now, rewarded = text(line), time.monotonic(), "reward" in line
        evaluated = line["val_loss"] is not None and line["val_loss"] != val
        found = {"reward": line["reward"]} if rewarded else {"train": line["train_loss"]}
        if evaluated:
            val = line["val_loss"]
            found["val"] = -val if rewarded else val
        for name, value in found.items():
            if math.isfinite(value):
                points.setdefault(name, []).append((line["step"], value))
        if line["step"] != line["steps"] and not evaluated and now - drawn < 0.5:
            return
        drawn = now
        bar = f'<progress value="{line["step"]}" max="{line["steps"]}" style="width: 420px"></progress>'
        html = f'{bar}<pre>{shown}</pre>{curve(points, line["steps"])}'
        bundle = {"text/plain": shown, "text/html": html}
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    return watch


def curve(points: dict[str, list[tuple[int, float]]], steps: int, width: int = 420, height: int = 140) -> str:
    """Return curves as SVG: lists of (step, value) by name, each thinned out to at most 200 points.

    The lowest and the highest value are beside the axis.
    """
    thin = {name: [*row[:: max(1, len(row) // 200)], row[-1]] for name, row in points.items()}
    values = [value for row in thin.values() for _, value in row]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (height - 20) / ((high - low) or 1.0)
    lines = "".join(
        f'<polyline fill="none" stroke="{PAINT[name]}" stroke-width="{1 if name == "train" else 2}" points="'
        + " ".join(f"{50 + (width - 60) * step / steps:.1f},{10 + (high - value) * scale:.1f}" for step, value in row)
        + '"/>' for name, row in thin.items())
    marks = "".join(f'<text x="44" y="{y}" font-size="11" text-anchor="end" fill="#888">{value:.3g}</text>'
                    for y, value in ((14, high), (height - 6, low)))
    names, legend = ", ".join(points), "".join(
        f'<text x="{width - 12}" y="{16 + 14 * k}" font-size="11" text-anchor="end" fill="{PAINT[name]}">{name}</text>'
        for k, name in enumerate(points))
    return (f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="curves: {names}"><path d="M50 6V{height - 6}H{width - 8}" fill="none" stroke="#888"/>'
            f"{marks}{lines}{legend}</svg>")


@contextmanager
def ladder_progress(expected: dict[Any, float]) -> Iterator[Callable[[str, Any, dict[str, Any]], None]]:
    """Yield a `watch(title, job, line)` for several runs in turn: progress of the current run, and the ETA of all.

    Args:
        expected: estimated seconds of each job. The measured time of finished jobs corrects the ETA.
    """
    started, smooth, printed = time.monotonic(), _Smooth(), 0.0
    done: list[Any] = []

    def facts(title: str, job: Any, line: dict[str, Any]) -> tuple[float, str]:
        nonlocal smooth
        if job not in done:
            done.append(job)
            smooth = _Smooth()
        part = line["step"] / line["steps"]
        past = sum(expected.get(earlier, 0.0) for earlier in done[:-1]) + part * expected.get(job, 0.0)
        share = past / (sum(expected.values()) or 1.0)
        spent = time.monotonic() - started
        left = f"  ETA {clock_time(spent / share - spent)}" if share > 0.005 else ""
        val = f"  val {line['val_loss']:.4f}" if line["val_loss"] is not None else ""
        return share, (f"rung {title}: step {line['step']:>5}/{line['steps']}  train {smooth(line['train_loss']):.4f}"
                       f"{val}  whole ladder {share:4.0%}{left}")

    if not live():
        def lines(title: str, job: Any, line: dict[str, Any]) -> None:
            nonlocal printed
            text = facts(title, job, line)[1]
            if time.monotonic() - printed > 10:
                printed = time.monotonic()
                say(text)

        yield lines
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(bar_width=None), TextColumn("{task.fields[facts]}")) as progress:
        task = progress.add_task("ladder", total=1.0, facts="")

        def bar(title: str, job: Any, line: dict[str, Any]) -> None:
            share, text = facts(title, job, line)
            progress.update(task, completed=share,
                            facts=shorten(text, progress.console.width, r"  train [\d.]+", r"  whole ladder +\d+%"))

        yield bar
