"""What the commands share whose models learn from answers of their own: `bardlet ppo`, `bardlet grpo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from bardlet.cli import stage
from bardlet.config.settings import FINE


@dataclass(frozen=True)
class OnPolicy(stage.Stage):
    """Settings of a stage that learns from answers which the model itself writes."""

    text: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL DATA [DATA ...]")] = ()
    """The model, a run folder of `bardlet sft`; then files of questions: conversations, preferences, or records of JSON
    with `prompt` and perhaps `answer`, .jsonl or .json, also .gz and .xz."""
    reward: str | None = None
    """What an answer is worth: `exact` (1 for the answer that stands in the data, else 0), a run folder of `bardlet
    reward`, or a command that reads a record of JSON a line and prints a number for each."""
    rollout: int = 128
    """Answers that the model writes before it learns from them, over all processes."""
    passes: int = 1
    """How often each answer is learned from."""
    answer_tokens: int = 64
    """Tokens of the longest answer; at most half of the window where it is not given."""
    temperature: float = 1.0
    """Of the answers: below 1 more careful, above 1 wilder."""
    clip: float = 0.2
    """By how much a token's probability may change, as a share, before it is learned no more."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: 100 rollouts)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: 100 rollouts)."""
    batch_size: int = 32
    """Answers of a micro-batch, over all processes."""
    eval_tokens: tyro.conf.Suppress[int] = 131_072
    schedule: Literal["stable-decay", "cosine", "linear", "constant"] = FINE["ppo"]["schedule"]
    """What follows the warm-up: constant then a linear decay, a half cosine, a line, or nothing."""
    warmup_steps: int = FINE["ppo"]["warmup_steps"]
    """Steps from zero to the peak learning rate (at most a fifth of the run)."""
    keep: Literal["best", "last", "average"] = FINE["ppo"]["keep"]
    """Weights of the result: of the last step, their mean over the last fifth of the steps, or those of the best
    held-out reward."""
    compile: Literal["auto", "on", "off"] = FINE["ppo"]["compile"]
    """torch.compile the blocks for learning; what is written and read otherwise is not compiled."""
