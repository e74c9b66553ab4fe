"""`bardlet ppo MODEL DATA --reward R`: a model learns from rewards, with a critic that expects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from bardlet.cli import on_policy, stage
from bardlet.config.settings import FINE, StageName


@dataclass(frozen=True)
class Command(on_policy.OnPolicy):
    """Proximal policy optimization: a model writes answers, and learns to write those that are worth more than its
    critic expected, not too far from where it began. What an answer is worth is for --reward to say."""

    stage: tyro.conf.Suppress[StageName] = "ppo"
    passes: int = FINE["ppo"]["passes"]
    """How often each answer is learned from."""
    beta: float = FINE["ppo"]["beta"]
    """What each nat costs by which it leaves the model that it began with; 0: nothing."""
    target_kl: float | None = None
    """Let beta follow, so that answers are so far (nats of an answer) from the model that it began with; none: beta
    stays."""
    lr: float = FINE["ppo"]["lr"]
    """Peak learning rate of AdamW."""
    muon_lr: float = FINE["ppo"]["muon_lr"]
    """Peak learning rate of Muon."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return stage.run(Command, argv, "ppo", "bardlet ppo runs/chats-sft questions.jsonl --reward runs/judge")
