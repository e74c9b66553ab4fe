"""`bardlet sft BASE DATA`: a model that has read text learns to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from bardlet.cli import train
from bardlet.cli.options import parse
from bardlet.config import FINE, Activation, Model
from bardlet.errors import BardletError


@dataclass(frozen=True)
class Command(train.Command):
    """Fine-tune a base on conversations: records of JSON with `messages` (role, content), or with `instruction`,
    perhaps `input`, and `output`. The loss is taken on the answers alone."""

    stage: tyro.conf.Suppress[Literal["pretrain", "sft"]] = "sft"
    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="BASE DATA [DATA ...]")] = ()
    """The base, a run folder or a Hugging Face folder (gpt2, qwen3); then files of conversations, .jsonl or .json, also
    .gz and .xz."""
    pack: bool = True
    """Several conversations in a row, none of which sees another; without it a row for each, filled up."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: three times all conversations)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: three times all conversations)."""
    lr: float = FINE["lr"]
    """Peak learning rate of AdamW."""
    muon_lr: float = FINE["muon_lr"]
    """Peak learning rate of Muon."""
    # what the base decides, and what other stages have, is not shown
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


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "sft", train.defaults(argv, Command))
    if command.text and command.config is None:
        base, *data = command.text
        command = replace(command, init=base, text=tuple(data))
    if command.init is None:
        raise BardletError("name the base, a run folder, and behind it a file of conversations: "
                           "bardlet sft runs/my-qwen3 chats.jsonl")
    return train.start(command, argv)
