"""Train, fine-tune and resume from Python: each function returns the finished `Run`.

    run = bardlet.train("my.txt", minutes=2)
    chat = bardlet.sft(run.folder, "chats.jsonl", steps=200)

Keywords are the settings of the command of the same name, with _ for -.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bardlet.config import combine, toml
from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.settings import Settings
from bardlet.config.stages import classes_with, config_class
from bardlet.errors import BardletError, printable
from bardlet.run import folder as run_folder
from bardlet.run.record import Record

if TYPE_CHECKING:
    from bardlet.api.models import Model

PathLike = str | os.PathLike[str]


class Run:
    """A run folder: its settings, what happened, and its model.

    folder: the path of the run. summary: what the command's `--json` prints; empty for a run that was opened.
    """

    def __init__(self, folder: PathLike, summary: Mapping[str, Any] | None = None) -> None:
        self.folder, self.summary = Path(folder), dict(summary or {})
        self.config, values = run_folder.settings(self.folder, use_edited=True)
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

    def __fspath__(self) -> str:
        return str(self.folder)

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
    return _start(None, text, settings, out)


@cache
def stage_function(kind: type[FineTuneConfig]) -> Callable[..., Run]:
    """Return the function of a fine-tuning stage: `bardlet.sft`, `bardlet.dpo` and so on."""

    def function(base: PathLike, *data: PathLike, out: PathLike | None = None, **settings: Any) -> Run:
        if "init" in settings:
            raise BardletError(f"bardlet.{kind.command}: init is not a keyword; the model is the first argument")
        return _start(kind, data, {"init": os.fspath(base), **settings}, out)

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
    steps = toml.plain(steps)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
        raise BardletError(f"bardlet.resume: steps = {printable(steps)}: must be a whole number")
    from bardlet import runner

    return Run(folder, runner.resume(Path(folder), reward, steps, allow_change))


def open_run(folder: PathLike) -> Run:
    """Open a run folder that exists."""
    return Run(folder)


def plan(*text: PathLike, **settings: Any) -> dict[str, Any]:
    """Return what `train` would do, without doing it: steps, parameters, reasons and the predicted loss."""
    started, config = time.monotonic(), _settings(None, text, settings)
    from bardlet import runner

    return runner.start(config, None, started, plan_only=True)


def _start(kind: type[FineTuneConfig] | None, text: Sequence[PathLike], settings: Mapping[str, Any],
           out: PathLike | None) -> Run:
    """Start a run of a fine-tuning stage, or of `train` if `kind` is None, and train to its end."""
    started, config = time.monotonic(), _settings(kind, text, settings)  # importing torch is part of the minutes
    from bardlet import runner

    summary = runner.start(config, None if out is None else os.fspath(out), started)
    return Run(summary["run"], summary)


def _settings(kind: type[FineTuneConfig] | None, text: Sequence[PathLike], settings: Mapping[str, Any]) -> Settings:
    """Return checked settings from the arguments of a function of the API."""
    where = f"bardlet.{kind.command if kind else 'train'}"
    reserved = {"stage": "each stage has a function of its own", "text": "name texts and data before the keywords",
                "plan": "use bardlet.plan(...)", "replans": "only run.toml has it"}
    for name, remedy in reserved.items():
        if name in settings:
            raise BardletError(f"{where}: {name} is not a keyword; {remedy}")
    values = {name: toml.plain(value) for name, value in settings.items()}
    file = Path(values.pop("config")) if values.get("config") else None
    if text:
        values["text"] = [str(os.fspath(each)) for each in text]
    wanted = kind or config_class(values)
    for name in values:
        if name not in wanted.__dataclass_fields__ and classes_with(name):
            raise BardletError(f"{where}: {name} {toml.why_not(name, wanted)}")
    if kind is None:
        checked = toml.from_mapping(values, where, wanted)
        return combine.configure({name: getattr(checked, name) for name in values}, file)
    values["stage"] = kind.stage
    checked = toml.from_mapping(values, where, kind)
    typed = {name: getattr(checked, name) for name in values if name != "stage"}
    return kind(**combine.file_settings(file, kind, typed) | typed)
