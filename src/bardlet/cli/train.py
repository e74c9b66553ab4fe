"""`bardlet train`: a text goes in, a run folder comes out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from bardlet import console
from bardlet.cli.options import parse
from bardlet.config.settings import PARALLEL, StageName, TrainConfig
from bardlet.config.toml import read_toml, settings_in

log = logging.getLogger("bardlet")

Kind = TypeVar("Kind", bound="Command")
@dataclass(frozen=True)
class Command(TrainConfig):
    """Train a model on a text. The result is a Hugging Face model folder, and a run that can be resumed."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Named corpora (`bardlet data` lists them), files, folders or globs; none: Tiny Shakespeare."""
    stage: tyro.conf.Suppress[StageName] = "pretrain"
    pack: tyro.conf.Suppress[bool] = True
    beta: tyro.conf.Suppress[float] = 0.1
    reward: tyro.conf.Suppress[str | None] = None
    rollout: tyro.conf.Suppress[int] = 128
    passes: tyro.conf.Suppress[int] = 1
    group: tyro.conf.Suppress[int] = 8
    answer_tokens: tyro.conf.Suppress[int] = 64
    temperature: tyro.conf.Suppress[float] = 1.0
    clip: tyro.conf.Suppress[float] = 0.2
    target_kl: tyro.conf.Suppress[float | None] = None
    replans: tyro.conf.Suppress[tuple[tuple[int, int], ...]] = ()
    out: str | None = None
    """The run folder to make; none: runs/NAME."""
    config: str | None = None
    """Take the settings of this TOML file; what else is given here goes before them."""
    plan: bool = False
    """Print the plan and stop."""
    json: bool = False
    """Print one JSON object on one line, last."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return start(_read(argv), argv)


def start(command: Command, argv: Sequence[str]) -> int:
    """Begin a run and bring it to its end; returns the exit code. argv: what of the settings was typed."""
    begun = time.monotonic()  # to load torch takes part of the minutes
    from bardlet import runner

    config = TrainConfig(**{f.name: getattr(command, f.name) for f in fields(TrainConfig)})
    given = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
             for word in argv if word.startswith("--")}
    in_file = settings_in(Path(command.config)) if command.config else set()
    result = runner.start(config, command.out, given, in_file, begun, command.plan)
    if command.json and result:
        console.say_json(result)
    return 0


def _read(argv: Sequence[str]) -> Command:
    """The command line as settings. Pairs are learned by an encoder-decoder where nobody named another model."""
    typed = {word.partition("=")[0] for word in argv}
    pairs = {"--pair", "--source", "--target", *PARALLEL} & typed and not {"--model", "--init"} & typed
    command = parse(Command, argv, "train", defaults(argv, Command, bool(pairs)))
    if pairs and not command.parallel:  # what looked like the name of pairs was another option's value
        return parse(Command, argv, "train", defaults(argv, Command))
    return command


def defaults(argv: Sequence[str], kind: type[Kind], pairs: bool = False) -> Kind | None:
    """The settings of `--config FILE`, before which the rest of the command line goes; encdec for pairs."""
    words = [word.partition("=") for word in argv]
    files = [value or argv[i + 1] for i, (word, _, value) in enumerate(words)
             if word == "--config" and (value or i + 1 < len(argv))]
    if not files:
        return kind(model="encdec") if pairs else None
    settings, _ = read_toml(Path(files[-1]))
    replans = () if any(word in ("--steps", "--minutes") for word, _, _ in words) else settings.replans
    values = {f.name: getattr(settings, f.name) for f in fields(settings)} | {"replans": replans}
    if (pairs or settings.parallel) and "model" not in settings_in(Path(files[-1])):
        values["model"] = "encdec"
    if any(word == "--minutes" for word, _, _ in words):
        values["steps"] = None
    if any(word == "--steps" for word, _, _ in words):
        values["minutes"] = None
    return kind(**values)
