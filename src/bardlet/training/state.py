"""What a run moves through its steps: objective, state, trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.data.batch import Batch
from bardlet.run.record import Record
from bardlet.runtime.distributed import Dist


@dataclass(frozen=True)
class Objective:
    """Batches, a loss and an evaluation: all that the loop knows of what is learned."""

    batch: Callable[[int], Batch]
    """The global batch of a step: the same on every process."""
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    """The summed loss of a batch."""
    count: Callable[[Batch], int]
    """How many terms that sum has."""
    evaluate: Callable[[nn.Module], float]
    """The validation loss (nats per term) of a model in eval mode."""
    describe_batch: Callable[[int], str] = lambda step: f"batch {step + 1}"
    """Where the batch of a step lies in the data, in words."""
    widest: Callable[[], Batch] | None = None
    """A batch that takes as much memory as any; None: they all take the same."""
    all_logits: bool = False
    """Whether the loss has the logits of all its tokens at once, not some at a time (`ops/cross_entropy.py`)."""
    metadata: Callable[[], dict[str, float]] = dict
    """What else there is to log of the batch that was made last."""
    stage_state: StageState | None = None
    """What the batches depend on besides the step, where they do."""
    period: int = 1
    """Steps after which the time that a step takes comes again."""


class StageState(Protocol):
    """What the batches of a run depend on besides settings and step: a checkpoint keeps it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, by name."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave; from nothing, begin."""


@dataclass
class State:
    """Where a run is. With weights, optimizer and random state it is all that going on needs."""

    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Optimizer steps planned."""
    seconds: float = 0.0
    """Time spent in training steps."""
    elapsed: float = 0.0
    """Time of the whole run, with preparation, compilation, evaluation and saving."""
    prepared: float = 0.0
    """How much of `elapsed` went by before the first step."""
    tokens: int = 0
    """Targets that were learned from."""
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last line of metrics.jsonl."""
    loss_steps: int = 0
    evaluated: int = 0
    """The step after which the last evaluation was."""
    skipped: int = 0
    """Steps skipped in a row because of a number that was none."""
    averaged: int = 0
    """How many steps' weights the average holds."""
    replans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Trainer:
    """The things that a run moves through its steps."""

    run: Path
    model: Any
    """One of bardlet.models, raw: neither compiled as a whole nor wrapped."""
    optimizers: list[torch.optim.Optimizer]
    objective: Objective
    config: Settings
    dist: Dist
    machine: dict[str, Any]
    record: Record
    """What run.toml says happened."""
    state: State = field(default_factory=State)
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """Mean of the weights, by parameter name; empty before the last fifth of the steps, and with --keep last."""
    best: float = math.inf
