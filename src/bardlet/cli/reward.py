"""`bardlet reward MODEL DATA`: a model that says how good an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardlet.cli import stage
from bardlet.config.settings import FINE, StageName


@dataclass(frozen=True)
class Command(stage.Stage):
    """Train a reward model: from records of JSON with `prompt`, `chosen` and `rejected`, texts or messages, it learns
    to give the greater number to the answer that was preferred. It begins with the body of a model that answers."""

    stage: tyro.conf.Suppress[StageName] = "reward"
    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL DATA [DATA ...]")] = ()
    """The model, a run folder of `bardlet sft`, or of a base with a bpe tokenizer; then files of preferences,
    .jsonl or .json, also .gz and .xz."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: all pairs once)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: all pairs once)."""
    batch_size: int = 16
    """Pairs of a micro-batch, over all processes."""
    lr: float = FINE["reward"]["lr"]
    """Peak learning rate of AdamW."""
    muon_lr: float = FINE["reward"]["muon_lr"]
    """Peak learning rate of Muon."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return stage.run(Command, argv, "reward", "bardlet reward runs/chats-sft preferences.jsonl")
