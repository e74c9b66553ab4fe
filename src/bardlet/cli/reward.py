"""`bardlet reward MODEL DATA`: a model that says how good an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardlet.cli import stage
from bardlet.cli.train import RunOptions
from bardlet.config.finetuning import RewardConfig


@dataclass(frozen=True)
class Command(RunOptions, RewardConfig):
    """Train a reward model: from records of JSON with `prompt`, `chosen` and `rejected`, texts or messages, it learns
    to give the greater number to the answer that was preferred. It begins with the body of a model that answers."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL DATA [DATA ...]")] = ()
    """The model, a run folder of `bardlet sft`, or of a base with a bpe tokenizer; then files of preferences,
    .jsonl or .json, also .gz and .xz."""


def main(argv: Sequence[str], names_model: bool = True) -> int:
    """Run the command; returns the exit code. names_model: the first word is the model, else a file names it."""
    return stage.run(Command, argv, "bardlet reward runs/chats-sft preferences.jsonl", names_model)
