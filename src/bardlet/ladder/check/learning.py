"""Tests that train: one batch is learned by heart, and 200 steps end where the rung's own model ends."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.check.build import Model
from bardlet.ladder.check.mistakes import Finding
from bardlet.ladder.check.sizes import SIZES
from bardlet.ladder.check.weights import rung_model

STEPS, ROWS, LR = 200, 8, 3e-3
SEEDS = (1337, 1338, 1339)
MARGIN = 0.4
"""Nats above the mean of the rung's own models. Right models in other styles (GELU, other initial weights, tied
embeddings, sinusoidal positions) end at most 0.2 above it; LOG.md has the measurement."""
PATIENCE = 2
"""A model above the band trains for so many times the steps more, before that counts as a finding."""
TOO_LOW = 1.4
"""Nats that no model reaches in so few steps without a look at the answers: the rungs end at 2.4 and above."""


def batches(data: Tensor, steps: int, seed: int, T: int = int(SIZES["block_size"])) -> list[tuple[Tensor, Tensor]]:
    """Return random windows of the text and their next tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        starts = torch.randint(len(data) - T - 1, (ROWS,), generator=generator)
        rows = torch.stack([data[i: i + T + 1] for i in starts])
        made.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return made


class OutOfTime(Exception):
    """The time limit leaves no time for more training."""


@dataclass
class Trainer:
    """Trains small models until a time of time.monotonic."""

    until: float

    def train(self, module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor],
              data: list[tuple[Tensor, Tensor]]) -> float:
        """Train without dropout; return the mean loss of the last tenth of the steps.

        Raises:
            OutOfTime: the time is over.
        """
        module.train()
        for each in module.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        parameters = [each for each in module.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LR)
        losses = []
        for x, y in data:
            if time.monotonic() > self.until:
                raise OutOfTime
            value = loss(x, y)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
        return statistics.mean(losses[-max(1, len(losses) // 10):])


def learner_loss(model: Model) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of a learner's model: its own if that is the cross-entropy, or that of its logits."""
    def loss(x: Tensor, y: Tensor) -> Tensor:
        if model.takes_targets:
            answer = model(x, x if model.shifts else y)
            if answer.loss is not None and answer.loss.requires_grad and model.own_loss:
                return answer.loss
        logits = model.logits(x)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    return loss


def rung_loss(trainer: Trainer, number: int, vocab: int, data: Tensor, seed: int) -> float:
    """Return the loss of a rung's own model after the same steps."""
    torch.manual_seed(seed)
    module = rung_model(number, vocab)
    return trainer.train(module, lambda x, y: module(x, y) / y.numel(), batches(data, STEPS, seed))


def findings(name: str, make: Callable[[], Model], data: Tensor, number: int,
             until: float = math.inf) -> tuple[list[Finding], str]:
    """Train fresh models; return the findings, and what was measured.

    Raises:
        OutOfTime: as `Trainer.train`.
    """
    trainer = Trainer(until)
    torch.manual_seed(SEEDS[0])
    alone = make()
    T, data = alone.longest, data % alone.vocab
    one = batches(data, 1, 1, T) * 60
    first = float(learner_loss(alone)(*one[0]).detach())
    last = trainer.train(alone.module, learner_loss(alone), one)
    if not last < first - 0.2:
        detail = f"60 steps on one batch took the loss from {first:.2f} to {last:.2f}"
        return [Finding("does-not-learn", name, detail)], ""
    learner = make()
    loss = trainer.train(learner.module, learner_loss(learner), batches(data, STEPS, SEEDS[0], T))
    usual = [rung_loss(trainer, number, learner.vocab, data, SEEDS[0])]
    if abs(loss - usual[0]) > MARGIN / 2:  # not near: more seeds decide
        usual += [rung_loss(trainer, number, learner.vocab, data, seed) for seed in SEEDS[1:]]
    mean = statistics.mean(usual)
    spread = statistics.stdev(usual) if len(usual) > 1 else 0.0
    said = f"{STEPS} steps: loss {loss:.2f}, rung {number} {mean:.2f}"
    detail = f"after {STEPS} steps its loss is {loss:.2f}, that of rung {number} {mean:.2f}"
    band = mean + max(4 * spread, MARGIN)
    if loss > band:  # tied embeddings, say, are slow at first and no mistake
        more = batches(data, PATIENCE * STEPS, SEEDS[1], T)
        if trainer.train(learner.module, learner_loss(learner), more) > band:
            return [Finding("does-not-learn", name, detail)], said
        said += ", reached later"
    if loss < TOO_LOW:
        return [Finding("leak", name, detail)], said
    return [], said
