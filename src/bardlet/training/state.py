"""Objective, state and trainer of a run."""

from __future__ import annotations

import math
import threading
import time
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
    """Batches, loss and evaluation: everything the training loop knows about a stage."""

    batch: Callable[[int], Batch]
    """Return the global batch of a step, the same on every rank."""
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    """Return the summed loss of a batch."""
    count: Callable[[Batch], int]
    """Return the number of terms in that sum."""
    evaluate: Callable[[nn.Module], float]
    """Return the validation loss (nats per term) of a model in eval mode."""
    describe_batch: Callable[[int], str] = lambda step: f"batch {step + 1}"
    """Name the position of a step's batch in the data, for messages."""
    widest: Callable[[], Batch] | None = None
    """Return a batch with the largest memory use; None if all batches use the same."""
    all_logits: bool = False
    """True if the loss materializes all logits at once instead of in chunks (`ops/cross_entropy.py`)."""
    metadata: Callable[[], dict[str, float]] = dict
    """Return additional values to log for the most recent batch."""
    evaluation_metadata: Callable[[], dict[str, float]] = dict
    """Return additional values to log for the most recent evaluation."""
    stage_state: StageState | None = None
    """State that the batches depend on besides the step; None if there is none."""
    period: int = 1
    """Number of steps after which the pattern of step times repeats (a rollout takes time once per period)."""


class StageState(Protocol):
    """State that a run's batches depend on besides settings and step; saved in checkpoints."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the whole state, by name."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the result of `tensors`; an empty dict resets the state to the start of a run."""


@dataclass
class State:
    """Progress of a run. With weights, optimizer state and RNG state, it is all that resuming needs."""

    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Optimizer steps planned."""
    seconds: float = 0.0
    """Seconds spent in training steps."""
    elapsed: float = 0.0
    """Seconds since the start of the run, with preparation, compilation, evaluation and saving."""
    prepared: float = 0.0
    """Seconds of `elapsed` before the first step."""
    tokens: int = 0
    """Targets trained on."""
    loss_sum: float = 0.0
    """Sum of the step losses since the last line of metrics.jsonl."""
    loss_steps: int = 0
    evaluated: int = 0
    """Step of the last evaluation."""
    skipped: int = 0
    """Consecutive steps skipped for NaN/inf."""
    loss_scale: float = 2.0**16
    """Factor of the loss in the backward pass, in fp16 only (`loss_scale.py`)."""
    scaled: int = 0
    """Updates since that factor changed."""
    averaged: int = 0
    """Number of steps in the average of the weights."""
    replans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Trainer:
    """Everything that the training loop reads or updates."""

    run: Path
    model: Any
    """A model of bardlet.models, neither compiled as a whole nor wrapped."""
    optimizers: list[torch.optim.Optimizer]
    objective: Objective
    config: Settings
    dist: Dist
    machine: dict[str, Any]
    record: Record
    """The [record] of run.toml."""
    state: State = field(default_factory=State)
    updating: bool = False
    """True during an update, when weights, average and step number do not belong together."""
    settled: bool = True
    """False in an update, and while something is written: then no other thread may save the run."""
    ending: bool = False
    """True if no further change may begin."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held to begin a change, and to forbid it."""
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """Mean of the weights by parameter name; empty before the last fifth of the steps and with --keep last."""
    best: float = math.inf
    unread: list[torch.Tensor] = field(default_factory=list)
    """Loss and norm, (2,), of the last steps, which are still on a GPU."""
    last: tuple[float, float] = (math.nan, math.nan)
    """Loss and norm of the last step that was looked at."""
    saver: Any = None
    """A `saving.Saver` if the model is sharded."""

    def begin_update(self) -> None:
        """Mark the beginning of an update."""
        self.unsettle()
        self.updating = True

    def unsettle(self) -> None:
        """Mark the beginning of a change. Once the run is `ending`, wait for the end of the process instead."""
        with self.lock:
            if not self.ending:
                self.settled = False
                return
        while True:
            time.sleep(1)

    def count_loss(self, loss: float) -> None:
        """Add a step's loss to the mean of the next line of metrics.jsonl, if it is finite."""
        if math.isfinite(loss):
            self.state.loss_sum += loss
            self.state.loss_steps += 1
