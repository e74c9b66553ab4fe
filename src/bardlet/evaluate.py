"""How good a model is: its loss on text that it did not learn from, in units that can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from bardlet.dist import autocast
from bardlet.loss import Batch, count_targets, next_token


@dataclass(frozen=True)
class Score:
    """A loss in the field's three units. The last two compare models whatever their tokenizers."""

    loss: float
    """Nats per token."""
    nats_per_char: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: str = "fp32") -> float:
    """The mean next-token loss in nats over every unmasked target of `batches`.

    The sums of the batches are added in float64 on the host. `dtype` is the precision of the matrix products.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        with autocast(dtype, device):
            total += next_token(model, {name: t.to(device) for name, t in batch.items()}).item()
        tokens += count_targets(batch)
    return total / tokens if tokens else math.nan


def score(loss: float, tokens: int, characters: int, size: int, first: str = "") -> Score:
    """`loss` (nats per token) in the three units.

    Args:
        tokens: how many tokens the text has; every one but the first was predicted.
        characters, size: the length of the text, in characters and in bytes of UTF-8.
        first: the text of the first token, which is left out of both.
    """
    nats = loss * (tokens - 1)
    characters, size = characters - len(first), size - len(first.encode())
    return Score(loss, nats / max(1, characters), nats / math.log(2) / max(1, size), tokens - 1)
