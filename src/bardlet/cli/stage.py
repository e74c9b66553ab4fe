"""What the commands of a chat model's stages share: `bardlet sft BASE DATA`, `bardlet dpo MODEL DATA`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from bardlet.cli import train
from bardlet.cli.options import parse
from bardlet.config.model import Activation
from bardlet.config.settings import Model, StageName
from bardlet.config.toml import settings_in
from bardlet.errors import BardletError


@dataclass(frozen=True)
class Stage(train.Command):
    """Settings of a stage. What the model decides that it begins with, and what other stages have, is not shown."""

    block_size: int = 128
    """Context window, in tokens; not given: that of the model."""
    init: tyro.conf.Suppress[str | None] = None
    model: tyro.conf.Suppress[Model] = "qwen3"
    tokenizer: tyro.conf.Suppress[Literal["auto", "char", "byte", "bpe"]] = "auto"
    vocab_size: tyro.conf.Suppress[int | None] = None
    n_layer: tyro.conf.Suppress[int] = 4
    n_encoder_layer: tyro.conf.Suppress[int | None] = None
    n_head: tyro.conf.Suppress[int] = 4
    n_kv_head: tyro.conf.Suppress[int | None] = None
    n_embd: tyro.conf.Suppress[int] = 192
    n_inner: tyro.conf.Suppress[int | None] = None
    tie_embeddings: tyro.conf.Suppress[bool] = True
    activation: tyro.conf.Suppress[Activation | None] = None
    field: tyro.conf.Suppress[str] = "text"
    source: tyro.conf.Suppress[str | None] = None
    target: tyro.conf.Suppress[str | None] = None
    pair: tyro.conf.Suppress[str | None] = None
    lowercase: tyro.conf.Suppress[bool | None] = None
    prefix_lm: tyro.conf.Suppress[bool] = False
    label_smoothing: tyro.conf.Suppress[float] = 0.0
    batch_tokens: tyro.conf.Suppress[int] = 4096


def run(kind: type[Stage], argv: Sequence[str], name: StageName, example: str) -> int:
    """Read the command line of a stage, of which the first word is the model that it begins with, and train."""
    settings = train.defaults(argv, kind)
    command = parse(kind, argv, name, settings)
    if command.config and "stage" in settings_in(Path(command.config)) and command.stage != name:
        raise BardletError(f"{command.config}: its settings are those of `bardlet {command.stage}`, not of {name}")
    if command.text != (settings.text if settings else ()):  # typed: else the file says what is learned
        first, *data = command.text
        command = replace(command, init=first, text=tuple(data) or (settings.text if settings else ()))
    command = replace(command, stage=name)
    if command.init is None:
        raise BardletError(f"name the model that is to learn, a run folder, and behind it a file: {example}")
    return train.start(command, argv)
