"""Train, fine-tune and resume from Python: each function returns the finished `Run`.

    run = bardlet.train("my.txt", minutes=2)
    chat = bardlet.sft(run.folder, "chats.jsonl", steps=200)

Keywords are the settings of the command of the same name, with _ for -.
"""

from __future__ import annotations

import base64
import html
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bardlet.api import arguments
from bardlet.api.runs import summarize
from bardlet.config import combine, toml
from bardlet.config.finetuning import FineTuneConfig, RolloutConfig
from bardlet.config.settings import Settings
from bardlet.config.stages import classes_with, config_class
from bardlet.errors import BardletError
from bardlet.run import folder as run_folder
from bardlet.run.metrics import read_metrics
from bardlet.run.record import Record
from bardlet.runtime import manifest

if TYPE_CHECKING:
    from bardlet.api.models import Model

PathLike = str | os.PathLike[str]


class Run:
    """A run folder: its settings, what happened, and its model.

    folder: the path of the run. summary: what the command's `--json` prints; empty for a run that was opened.
    """

    def __init__(self, folder: PathLike, summary: Mapping[str, Any] | None = None) -> None:
        self.folder, self.summary = Path(arguments.path(folder, "bardlet.open_run: folder")), dict(summary or {})
        self.config, values = run_folder.settings(self.folder, use_edited=True)
        self._values = values

    @cached_property
    def record(self) -> Record:
        """Results and statistics of the run: a `TextRecord`, `PairsRecord`, ... by stage."""
        from bardlet.stages import stage_of

        return stage_of(self.config).record_class.of(self._values)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Losses and other figures by step: dictionaries with `step`, `train_loss`, `val_loss` and others."""
        return read_metrics(self.folder)

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded on first use."""
        from bardlet.api.models import load

        return load(self.folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Return the run as a notebook shows it: name, result and curve."""
        run = summarize(self.folder)
        facts = (run.command, run.text, run.model, run.parameters and f"{run.parameters:,} parameters",
                 None if run.steps is None else f"{run.steps:,} steps",
                 None if run.minutes is None else f"{run.minutes:.1f} minutes", run.state)
        line = html.escape(", ".join(str(fact) for fact in facts if fact))
        text = f"<p><b>{html.escape(str(self.folder))}</b>: {html.escape(run.result)}<br>{line}</p>"
        if not os.path.lexists(self.folder / "loss.png"):
            return text
        picture = base64.b64encode(manifest.inside(self.folder, "loss.png").read_bytes()).decode()
        return f'{text}<img src="data:image/png;base64,{picture}" alt="curve of the run" width="560">'


def train(*text: PathLike | Sequence[PathLike], out: PathLike | None = None, config: PathLike | None = None,
          **settings: Any) -> Run:  # fmt: skip
    """Train a model on texts, or on sentence pairs (`source` and `target`, or `pair`).

    Args:
        text: named corpora, files, folders or globs, or lists of them; none: Tiny Shakespeare.
        out: the run folder to create; None: runs/NAME.
        config: a TOML settings file, such as the run.toml of a run; keywords override it.
        settings: the settings of `bardlet train`, for example minutes=2, n_layer=6.

    Returns:
        The finished run.

    Raises:
        BardletError: an unknown setting, a value that does not fit, or a run that cannot continue.
    """
    return _start(None, text, settings, out, config)


class StageFunction(Protocol):
    """A function that trains a model further: `bardlet.sft`, `bardlet.reward`, `bardlet.dpo` and so on."""

    __name__: str

    def __call__(self, model: PathLike, /, *data: PathLike | Sequence[PathLike], out: PathLike | None = None,
                 config: PathLike | None = None, **settings: Any) -> Run: ...  # fmt: skip


def stage_function(kind: type[FineTuneConfig]) -> StageFunction:
    """Return the function of a fine-tuning stage."""

    def function(model: PathLike, /, *data: PathLike | Sequence[PathLike], out: PathLike | None = None,
                 config: PathLike | None = None, **settings: Any) -> Run:  # fmt: skip
        if "init" in settings:
            raise BardletError(f"bardlet.{kind.command}: init is not a keyword; the model is the first argument")
        base = arguments.path(model, f"bardlet.{kind.command}: model")
        return _start(kind, data, {"init": base, **settings}, out, config)

    function.__name__ = function.__qualname__ = kind.command
    function.__doc__ = _stage_doc(kind)
    return function


def _stage_doc(kind: type[FineTuneConfig]) -> str:
    """Return the docstring of a stage's function."""
    about = arguments.in_python(kind.about, {"reward": "`reward`"}).replace(" DATA", " `data`")
    names = ", ".join(field.name for field in fields(kind) if field.name not in ("text", "init", "replans"))
    example = 'reward="exact", which is required' if issubclass(kind, RolloutConfig) else "minutes=5, lora=16"
    return f"""{kind.summary[0].upper()}{kind.summary[1:]}.

{textwrap.fill(about, 100)}

Args:
    model: the model to start from: a run folder, a `Run`, a `Model` or a Hugging Face folder.
    data: files (.jsonl or .json, also .gz and .xz), or lists of them.
    out: the run folder to create; None: runs/NAME.
    config: a TOML settings file, such as the run.toml of a run; keywords override it.
    settings: the settings of `bardlet {kind.command}`, for example {example}. Their names:
{textwrap.indent(textwrap.fill(names, 92), " " * 8)}.

Returns:
    The finished `Run`.

Raises:
    BardletError: an unknown setting, a value that does not fit, or data that cannot be read.
"""


def resume(folder: PathLike, *, steps: int | None = None, minutes: float | None = None, allow_change: bool = False,
           reward: str | None = None) -> Run:
    """Continue a run exactly where it stopped (`bardlet resume`).

    Args:
        folder: the run folder, or a `Run`.
        steps: a new total number of steps; needs allow_change.
        minutes: how much longer to train, at the pace so far, in place of steps; needs allow_change.
        allow_change: continue even if machine, precision, compiler or text changed; no longer bit for bit.
        reward: the run's reward command; bardlet never runs a command that only a file names.

    Returns:
        The finished run.

    Raises:
        BardletError: no run folder, a run that is finished or in use, or a change without allow_change.
    """
    path = Path(arguments.path(folder, "bardlet.resume: folder"))
    steps = toml.typed(steps, int | None, "bardlet.resume: steps")
    minutes = toml.typed(minutes, float | None, "bardlet.resume: minutes")
    allow_change = toml.typed(allow_change, bool, "bardlet.resume: allow_change")
    reward = toml.typed(reward, str | None, "bardlet.resume: reward")
    from bardlet import runner

    return Run(folder, runner.resume(path, reward, steps, allow_change, minutes))


def open_run(folder: PathLike) -> Run:
    """Open a run folder that exists, without training.

    Args:
        folder: the run folder.

    Returns:
        The run: its settings, its record and its model. Its summary is empty.

    Raises:
        BardletError: not a run folder, or a damaged run.toml.
    """
    return Run(folder)


def plan(*text: PathLike | Sequence[PathLike], config: PathLike | None = None, **settings: Any) -> dict[str, Any]:
    """Print what `train` would do, and return it, without training or creating a run folder.

    Args:
        text: named corpora, files, folders or globs, or lists of them; none: Tiny Shakespeare.
        config: a TOML settings file, such as the run.toml of a run; keywords override it.
        settings: the settings of `bardlet train`, for example minutes=2, n_layer=6.

    Returns:
        steps, tokens_per_step, parameters, model, tokenizer and compiled; expected, the predicted loss, and reasons,
            why the plan chose these settings.

    Raises:
        BardletError: an unknown setting, a value that does not fit, or a text that cannot be read.
    """
    started, checked = time.monotonic(), _settings(None, text, settings, config, "bardlet.plan")
    from bardlet import runner

    return runner.start(checked, None, started, plan_only=True)


def _start(kind: type[FineTuneConfig] | None, text: Sequence[Any], settings: Mapping[str, Any], out: PathLike | None,
           config: PathLike | None) -> Run:  # fmt: skip
    """Start a run of a fine-tuning stage, or of `train` if `kind` is None, and train to its end."""
    started = time.monotonic()  # importing torch is part of the minutes
    where = f"bardlet.{kind.command if kind else 'train'}"
    folder = None if out is None else arguments.path(out, f"{where}: out")
    checked = _settings(kind, text, settings, config, where)
    from bardlet import runner

    summary = runner.start(checked, folder, started)
    return Run(summary["run"], summary)


def _settings(kind: type[FineTuneConfig] | None, text: Sequence[Any], settings: Mapping[str, Any],
              config: PathLike | None, where: str) -> Settings:  # fmt: skip
    """Return checked settings from the arguments of a function of the API. where: its name, for error messages."""
    reserved = {"stage": "each stage has a function of its own", "text": "name texts and data before the keywords",
                "plan": "use bardlet.plan(...)", "replans": "only run.toml has it"}
    for name, remedy in reserved.items():
        if name in settings:
            raise BardletError(f"{where}: {name} is not a keyword; {remedy}")
    values = {name: toml.plain(value) for name, value in settings.items()}
    file = None if config is None else Path(arguments.path(config, f"{where}: config"))
    if text:
        values["text"] = list(arguments.paths(text, f"{where}: {'data' if kind else 'text'}"))
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
