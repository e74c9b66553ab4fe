"""Dropout whose mask costs one random byte per activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("bardlet::random_bytes", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bytes(x: Tensor) -> Tensor:
    """Return random bytes (uint8, CPU) in the shape of x from torch's generator, eight per 64-bit number drawn.

    It is a custom operator so that compiled code calls it too and drops what eager code drops. It takes x instead of a
    shape because the compiler merges calls with equal arguments: two dropout layers of a block would share a mask.
    """
    random = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    return random.view(torch.uint8)[: x.numel()].view(x.shape)


@random_bytes.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def byte_dropout(x: Tensor, p: float) -> Tensor:
    """Set a random share p of x's elements to 0, and scale up the others to keep the mean.

    Srivastava et al. 2014, *Dropout*; scaled in training, as is usual today. On a CPU F.dropout draws 24 bits per
    element, which doubled the time of a compiled step. One byte is enough: p is rounded to a multiple of 1/256, at
    least 1/256 and at most 255/256, and the scale is that of the rounded p.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    keep = keep_prob(p, x.device)
    # compare floats: the compiler does not vectorize the comparison of bytes, which takes ten times as long
    return torch.where(random_bytes(x.detach()).float() >= round(256 * (1 - keep)), x * (1 / keep), 0.0)


def keep_prob(p: float, device: torch.device) -> float:
    """Return the share of the elements that `byte_dropout` keeps."""
    return 1 - min(max(1, round(256 * p)), 255) / 256 if device.type == "cpu" else 1 - p


class Dropout(nn.Module):
    """`byte_dropout` in training, the identity otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return byte_dropout(x, self.p) if self.training else x
