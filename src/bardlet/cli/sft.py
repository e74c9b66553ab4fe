"""`bardlet sft BASE DATA`: a model that has read text learns to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardlet.cli import stage
from bardlet.config.settings import FINE, StageName


@dataclass(frozen=True)
class Command(stage.Stage):
    """Fine-tune a base on conversations: records of JSON with `messages` (role, content), or with `instruction`,
    perhaps `input`, and `output`. The loss is taken on the answers alone."""

    stage: tyro.conf.Suppress[StageName] = "sft"
    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="BASE DATA [DATA ...]")] = ()
    """The base, a run folder with a bpe tokenizer (gpt2, qwen3); then files of conversations, .jsonl or .json, also
    .gz and .xz."""
    pack: bool = True
    """Several conversations in a row, none of which sees another; without it a row for each, filled up."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: three times all conversations)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: three times all conversations)."""
    lr: float = FINE["sft"]["lr"]
    """Peak learning rate of AdamW."""
    muon_lr: float = FINE["sft"]["muon_lr"]
    """Peak learning rate of Muon."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return stage.run(Command, argv, "sft", "bardlet sft runs/my-qwen3 chats.jsonl")
