"""`bardlet grpo MODEL DATA --reward R`: a model learns from groups of its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from bardlet.cli import on_policy, stage
from bardlet.config.settings import FINE, StageName


@dataclass(frozen=True)
class Command(on_policy.OnPolicy):
    """Group relative policy optimization: a model writes several answers to each question, and learns to write those
    that are worth more than the others of their group. What an answer is worth is for --reward to say."""

    stage: tyro.conf.Suppress[StageName] = "grpo"
    group: int = 8
    """Answers to each question, which are compared with each other."""
    beta: float = FINE["grpo"]["beta"]
    """How much it costs to leave the model that it began with; 0: nothing."""
    lr: float = FINE["grpo"]["lr"]
    """Peak learning rate of AdamW."""
    muon_lr: float = FINE["grpo"]["muon_lr"]
    """Peak learning rate of Muon."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return stage.run(Command, argv, "grpo", "bardlet grpo runs/chats-sft questions.jsonl --reward exact")
