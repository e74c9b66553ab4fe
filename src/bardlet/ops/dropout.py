"""Dropout whose mask costs one random byte an activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("bardlet::random_bytes", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bytes(x: Tensor) -> Tensor:
    """Random bytes (uint8, CPU) in the shape of x from torch's generator, eight of each 64-bit number that it draws.

    An operator of its own, so that compiled code calls it, too, and drops what eager code drops. It takes x, not its
    shape: the compiler merges calls with equal arguments, and two places of a block would share a mask.
    """
    drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.uint8)[: x.numel()].view(x.shape)


@random_bytes.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def byte_dropout(x: Tensor, p: float) -> Tensor:
    """x with a part p of its elements, drawn anew at each call, set to 0, and the others grown to keep the mean.

    Srivastava et al. 2014, *Dropout*; scaled in training, as everywhere today. On a CPU F.dropout draws 24 bits for
    each element, which doubled the time of a compiled step. A byte is enough: p is then rounded to a multiple of
    1/256, at least 1 and at most 255 of them, and the scale is that of the rounded p.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    share = keep_prob(p, x.device)
    # compared as floats: the compiler has no vector instructions for the bytes themselves, and takes ten times as long
    return torch.where(random_bytes(x.detach()).float() >= round(256 * (1 - share)), x * (1 / share), 0.0)


def keep_prob(p: float, device: torch.device) -> float:
    """The part of the elements that `byte_dropout` keeps."""
    return 1 - min(max(1, round(256 * p)), 255) / 256 if device.type == "cpu" else 1 - p


class Dropout(nn.Module):
    """`byte_dropout` in training, nothing otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return byte_dropout(x, self.p) if self.training else x
