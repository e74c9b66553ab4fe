"""Train, fine-tune and resume from Python: each function returns the finished `Run`.

    run = bardlet.train("my.txt", minutes=2)
    chat = bardlet.sft(run.folder, "chats.jsonl", steps=200)

Keywords are the settings of the command of the same name, with _ for -.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bardlet.config import toml
from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.pretraining import FromScratch
from bardlet.config.settings import Settings
from bardlet.config.stages import classes_with, config_class
from bardlet.errors import BardletError
from bardlet.run import folder as run_folder
from bardlet.run.record import Record

if TYPE_CHECKING:
    from bardlet.api.models import Model

PathLike = str | Path


class Run:
    """A run folder: its settings, what happened, and its model.

    folder: the path of the run. summary: what the command's `--json` prints; empty for a run that was opened.
    """

    def __init__(self, folder: PathLike, summary: Mapping[str, Any] | None = None) -> None:
        self.folder, self.summary = Path(folder), dict(summary or {})
        self.config, values = run_folder.settings(self.folder, changed=True)
        self._values = values

    @cached_property
    def record(self) -> Record:
        """Results and statistics of the run: a `TextRecord`, `PairsRecord`, ... by stage."""
        from bardlet.stages import stage_of

        return stage_of(self.config).record_class.of(self._values)

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded on first use."""
        from bardlet.api.models import load

        return load(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


def train(*text: PathLike, out: PathLike | None = None, **settings: Any) -> Run:
    """Train a model on texts, or on sentence pairs (`source` and `target`, or `pair`).

    Args:
        text: named corpora, files, folders or globs; none: Tiny Shakespeare.
        out: the run folder to create; None: runs/NAME.
        settings: the settings of `bardlet train`, for example minutes=2, n_layer=6.

    Raises:
        BardletError: an unknown setting, a value that does not fit, or a run that cannot continue.
    """
    return _start(None, {"text": text, **settings}, out)


def stage_function(kind: type[FineTuneConfig]) -> Callable[..., Run]:
    """Return the function of a fine-tuning stage: `bardlet.sft`, `bardlet.dpo` and so on."""

    def function(base: PathLike, *data: PathLike, out: PathLike | None = None, **settings: Any) -> Run:
        return _start(kind, {"init": base, "text": data, **settings}, out)

    function.__name__ = function.__qualname__ = kind.command
    function.__doc__ = f"""{kind.about}

    Args:
        base: the model to train, a run or a Hugging Face folder.
        data: files.
        out: the run folder to create; None: runs/NAME.
        settings: the settings of `bardlet {kind.command}`, for example minutes=5, lora=16.

    Raises:
        BardletError: an unknown setting, a value that does not fit, or data that cannot be read.
    """
    return function


def resume(folder: PathLike, *, steps: int | None = None, allow_change: bool = False,
           reward: str | None = None) -> Run:
    """Continue a run exactly where it stopped (`bardlet resume`).

    Args:
        steps: a new total number of steps; needs allow_change.
        allow_change: continue even if machine, precision, compiler or text changed; no longer bit for bit.
        reward: the run's reward command; bardlet never runs a command that only a file names.
    """
    from bardlet import runner

    return Run(folder, runner.resume(Path(folder), reward, steps, allow_change))


def open_run(folder: PathLike) -> Run:
    """Open a run folder that exists."""
    return Run(folder)


def _start(kind: type[Settings] | None, values: Mapping[str, Any], out: PathLike | None) -> Run:
    """Start a run and train it to its end. kind: the settings class; None: by `config_class`."""
    started = time.monotonic()  # importing torch is part of the minutes
    values = {name: _plain(value) for name, value in values.items()}
    if kind is not None:
        values["stage"] = kind.stage
    where = f"bardlet.{kind.command if kind else 'train'}"
    kind = kind or config_class(values)
    for name in values.keys() - {"stage", *(each.name for each in fields(kind))}:
        if classes_with(name):
            raise BardletError(f"{where}: {name} {toml.why_not(name, kind)}")
    config = toml.from_mapping(values, where, kind)
    if isinstance(config, FromScratch):
        config.refuse_unused(values)
    from bardlet import runner

    summary = runner.start(config, None if out is None else str(out), started)
    return Run(summary["run"], summary)


def _plain(value: Any) -> Any:
    """Return a value as run.toml stores it: paths as text."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
