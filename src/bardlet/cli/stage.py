"""What the commands of a chat model's stages share: `bardlet sft BASE DATA`, `bardlet dpo MODEL DATA`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bardlet import console
from bardlet.cli import train
from bardlet.cli.options import parse
from bardlet.config.finetuning import RolloutConfig, is_command
from bardlet.config.stages import CONFIGS, config_class
from bardlet.config.toml import settings_in
from bardlet.errors import BardletError

NOT_TYPED = (*train.NOT_TYPED, "init")
"""Settings that stand in files alone; the model is the first word of the command line."""


def run(kind: type[Any], argv: Sequence[str], example: str, names_model: bool) -> int:
    """Read the command line of a stage, of which the first word is the model that it begins with, and train.

    Args:
        kind: the stage's settings with `train.RunOptions`.
        names_model: whether the first word of `argv` is the model; else a file of settings names it.
    """
    console.show_notices(os.environ.get("RANK", "0") == "0")
    config = next(config for config in CONFIGS if issubclass(kind, config))
    name, file = config.command, train.config_file(argv)
    if file and (values := settings_in(file)).get("stage", name) != name:
        other = config_class(values).command
        raise BardletError(f"{file}: its settings are those of `bardlet {other}`, not of {name}")
    settings = train.defaults(argv, kind)
    command = parse(kind, argv, name, settings, NOT_TYPED)
    before = settings.text if settings else ()
    if names_model and command.text != before:  # typed: else the file says what is learned
        first, *data = command.text
        command = replace(command, init=first, text=tuple(data) or before)
    if command.init is None:
        raise BardletError(f"name the model that is to learn, a run folder, and behind it a file: {example}")
    if isinstance(command, RolloutConfig) and is_command(command.reward) and "reward" not in train.typed(argv):
        raise BardletError(f"--reward '{command.reward}': a program is not run because a file names it; say it again: "
                           f"`bardlet {name} --config ... --reward ...`")
    return train.start(command, config)
