"""`bardlet train`: a text goes in, a run folder comes out."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.pretraining import SET_BY_WEIGHTS, TrainConfig, TranslationConfig
from bardlet.config.settings import Settings, flag
from bardlet.config.stages import CONFIGS, NAMED_PAIRS, config_class
from bardlet.config.toml import read_toml, settings_in

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class RunOptions:
    """What a command that trains is told besides the settings of the run."""

    out: str | None = None
    """The run folder to make; none: runs/NAME."""
    config: str | None = None
    """Take the settings of this TOML file; what else is given here goes before them."""
    plan: bool = False
    """Print the plan and stop."""
    json: bool = False
    """Print one JSON object on one line, last."""


@dataclass(frozen=True)
class Command(RunOptions, TrainConfig):
    """Train a model on a text. The result is a Hugging Face model folder, and a run that can be resumed. With --source
    and --target, or --pair, it learns to translate; `bardlet train --pair de-en --help` lists the settings of that."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Named corpora (`bardlet data` lists them), files, folders or globs; none: Tiny Shakespeare."""


@dataclass(frozen=True)
class PairsCommand(RunOptions, TranslationConfig):
    """Train a model that translates, on pairs of sentences. The result is a Hugging Face model folder, and a run that
    can be resumed."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """A named parallel corpus: multi30k."""


Kind = TypeVar("Kind", bound=RunOptions)

NOT_TYPED = ("replans",)
"""Settings that stand in files alone."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code. The file of settings of another stage is for that stage's command."""
    console.show_notices(os.environ.get("RANK", "0") == "0")
    file = config_file(argv)
    name = settings_in(file).get("stage") if file else None
    if name in {config.stage for config in CONFIGS if issubclass(config, FineTuneConfig)}:
        return int(importlib.import_module(f"bardlet.cli.{name}").main(argv, names_model=False))
    command = read(argv)
    return start(command, TranslationConfig if isinstance(command, PairsCommand) else TrainConfig)


def start(command: RunOptions, kind: type[Settings]) -> int:
    """Begin a run by the settings in `command`, of the class `kind`, and bring it to its end. Returns the exit code."""
    begun = time.monotonic()  # to load torch takes part of the minutes
    from bardlet import runner

    config = kind(**{field.name: getattr(command, field.name) for field in fields(kind)})
    result = runner.start(config, command.out, begun, command.plan)
    if command.json and result:
        console.say_json(result)
    return 0


def read(argv: Sequence[str]) -> Command | PairsCommand:
    """The command line as settings.

    A setting that was typed and would do nothing is an error; one that a file has, which may be of another run, is left
    out with a notice.
    """
    kind: type[Command | PairsCommand] = PairsCommand if _names_pairs(argv) else Command
    command = parse(kind, argv, "train", defaults(argv, kind), NOT_TYPED)
    names = typed(argv)
    if idle := [name for name in command.unused() if name not in names]:
        log.warning("%s: not used, %s does not have that", ", ".join(idle), command.model)
        command = replace(command, **{name: getattr(kind, name) for name in idle})
    command.refuse_unused(names)
    if command.init and (ignored := [name for name in SET_BY_WEIGHTS if name in names]):
        log.warning("%s: not used, --init %s decides it", ", ".join(map(flag, ignored)), command.init)
        command = replace(command, **{name: getattr(kind, name) for name in ignored})
    return command


def typed(argv: Sequence[str]) -> set[str]:
    """The names of the settings on a command line."""
    return {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            for word in argv if word.startswith("--")}


def _names_pairs(argv: Sequence[str]) -> bool:
    """Whether a command line, or the file of settings that it names, is about pairs of sentences."""
    switches = {flag(name) for name, hint in get_type_hints(Command).items() if hint is bool}
    texts = [word for word, before in zip(argv, ["", *argv], strict=False)  # not the value of an option
             if not before.startswith("--") or "=" in before or before.replace("--no-", "--") in switches]
    file = config_file(argv)
    first = next((word for word in texts if not word.startswith("--")), None)
    if {"pair", "source", "target"} & typed(argv) or first in NAMED_PAIRS:
        return True
    return file is not None and first is None and config_class(settings_in(file)) is TranslationConfig


def config_file(argv: Sequence[str]) -> Path | None:
    """What --config names."""
    words = [word.partition("=") for word in argv]
    files = [value or argv[i + 1] for i, (word, _, value) in enumerate(words)
             if word == "--config" and (value or i + 1 < len(argv))]
    return Path(files[-1]) if files else None


def defaults(argv: Sequence[str], kind: type[Kind]) -> Kind | None:
    """The settings of `--config FILE` as defaults for `kind`; None: no file is named."""
    file = config_file(argv)
    if file is None:
        return None
    config = next(config for config in CONFIGS if issubclass(kind, config))
    settings, _ = read_toml(file, config)
    values = {field.name: getattr(settings, field.name) for field in fields(config)}
    known = {*values, "stage", *(SET_BY_WEIGHTS if issubclass(config, FineTuneConfig) else ())}
    if unused := [name for name in settings_in(file) if name not in known]:
        who = {TrainConfig: "a run on a text", TranslationConfig: "a run on pairs"}.get(config)
        who = who or f"`bardlet {config.command}`"
        log.warning("%s: not used, %s does not have that", ", ".join(unused), who)
    if names := {"steps", "minutes"} & typed(argv):
        values |= {"replans": (), **dict.fromkeys({"steps", "minutes"} - names)}
    return kind(**values)
