"""`bardlet ppo MODEL DATA --reward R`: a model learns from rewards, with a critic that expects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardlet.cli import stage
from bardlet.cli.train import RunOptions
from bardlet.config.finetuning import PPOConfig


@dataclass(frozen=True)
class Command(RunOptions, PPOConfig):
    """Proximal policy optimization: a model writes answers, and learns to write those that are worth more than its
    critic expected, not too far from where it began. What an answer is worth is for --reward to say."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL DATA [DATA ...]")] = ()
    """The model, a run folder of `bardlet sft`; then files of questions: conversations, preferences, or records of JSON
    with `prompt` and perhaps `answer`, .jsonl or .json, also .gz and .xz."""


def main(argv: Sequence[str], names_model: bool = True) -> int:
    """Run the command; returns the exit code. names_model: the first word is the model, else a file names it."""
    return stage.run(Command, argv, "bardlet ppo runs/chats-sft questions.jsonl --reward runs/judge", names_model)
