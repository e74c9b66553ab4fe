"""Running mean of the weights over the last fifth of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bardlet.training.state import Trainer


def add_to_average(trainer: Trainer) -> None:
    """Add the current weights to their mean over the last fifth of the steps; the fifth is fixed, not tuned."""
    if trainer.state.step <= 0.8 * trainer.state.steps:
        trainer.average.clear()  # averaging may have started too early for a plan extended since
        trainer.state.averaged = 0
        return
    trainer.state.averaged += 1
    for name, p in trainer.model.named_parameters():
        if name in trainer.average:
            trainer.average[name].lerp_(p.detach(), 1 / trainer.state.averaged)
        elif p.requires_grad:
            trainer.average[name] = p.detach().clone()


@contextmanager
def average_weights(trainer: Trainer) -> Iterator[None]:
    """Swap the averaged weights, if any, into the model inside the `with` block."""
    original = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name in trainer.average}
    _copy_into(trainer.model, trainer.average)
    try:
        yield
    finally:
        _copy_into(trainer.model, original)


@torch.no_grad()
def _copy_into(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in weights:
            p.copy_(weights[name])
