"""What the commands of a chat model's stages share: `bardlet sft BASE DATA`, `bardlet dpo MODEL DATA`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from bardlet.cli import train
from bardlet.cli.options import parse
from bardlet.config import Activation, Model
from bardlet.errors import BardletError


@dataclass(frozen=True)
class Stage(train.Command):
    """Settings of a stage. What the model decides that it begins with, and what other stages have, is not shown."""

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


def run(kind: type[Stage], argv: Sequence[str], name: str, example: str) -> int:
    """Read the command line of a stage, of which the first word is the model that it begins with, and train."""
    command = parse(kind, argv, name, train.defaults(argv, kind))
    if command.text and command.config is None:
        first, *data = command.text
        command = replace(command, init=first, text=tuple(data))
    if command.init is None:
        raise BardletError(f"name the model that is to learn, a run folder, and behind it a file: {example}")
    return train.start(command, argv)
