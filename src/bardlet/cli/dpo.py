"""`bardlet dpo MODEL DATA`: a model learns which answers are preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardlet.cli import stage
from bardlet.config.settings import FINE, StageName


@dataclass(frozen=True)
class Command(stage.Stage):
    """Direct preference optimization: a model that answers learns from records of JSON with `prompt`, `chosen` and
    `rejected`, texts or messages, which of two answers is preferred. Its reference is the model as it is now."""

    stage: tyro.conf.Suppress[StageName] = "dpo"
    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL DATA [DATA ...]")] = ()
    """The model, a run folder of `bardlet sft`, or of a base with a bpe tokenizer; then files of preferences,
    .jsonl or .json, also .gz and .xz."""
    beta: float = 0.1
    """How much it costs to leave the model that it began with; lower goes further."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: all pairs once)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: all pairs once)."""
    batch_size: int = 16
    """Pairs of a micro-batch, over all processes."""
    lr: float = FINE["dpo"]["lr"]
    """Peak learning rate of AdamW."""
    muon_lr: float = FINE["dpo"]["muon_lr"]
    """Peak learning rate of Muon."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return stage.run(Command, argv, "dpo", "bardlet dpo runs/chats-sft preferences.jsonl")
