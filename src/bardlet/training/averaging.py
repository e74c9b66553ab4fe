"""The running mean of the weights over the last fifth of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bardlet.training.state import Trainer


def _add_to_average(t: Trainer) -> None:
    """The mean of the weights after each of the last fifth of the steps: a fixed rule, chosen by nothing."""
    if t.state.step <= 0.8 * t.state.steps:
        t.average.clear()  # a plan that has grown may have begun too early
        t.state.averaged = 0
        return
    t.state.averaged += 1
    for name, p in t.model.named_parameters():
        if name in t.average:
            t.average[name].lerp_(p.detach(), 1 / t.state.averaged)
        elif p.requires_grad:
            t.average[name] = p.detach().clone()


@contextmanager
def averaged(t: Trainer) -> Iterator[None]:
    """Inside, the model has the averaged weights, if there are any."""
    own = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    _put(t.model, t.average)
    try:
        yield
    finally:
        _put(t.model, own)


@torch.no_grad()
def _put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in weights:
            p.copy_(weights[name])
