"""`bardlet sft BASE DATA`: a model that has read text learns to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardlet.cli import stage
from bardlet.cli.train import RunOptions
from bardlet.config.finetuning import SFTConfig


@dataclass(frozen=True)
class Command(RunOptions, SFTConfig):
    """Fine-tune a base on conversations: records of JSON with `messages` (role, content), or with `instruction`,
    perhaps `input`, and `output`. The loss is taken on the answers alone."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="BASE DATA [DATA ...]")] = ()
    """The base, a run folder with a bpe tokenizer (gpt2, qwen3); then files of conversations, .jsonl or .json, also
    .gz and .xz."""


def main(argv: Sequence[str], names_model: bool = True) -> int:
    """Run the command; returns the exit code. names_model: the first word is the model, else a file names it."""
    return stage.run(Command, argv, "bardlet sft runs/my-qwen3 chats.jsonl", names_model)
