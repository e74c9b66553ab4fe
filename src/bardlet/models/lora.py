"""LoRA: a matrix that stays as it is, and beside it the product of two thin ones that learn.

Hu et al. (2021), *LoRA: Low-Rank Adaptation of Large Language Models*. To the outside an adapted layer has one matrix,
the sum: in `weight`, in `state_dict()`, and so in every file that is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.errors import BardletError

ALPHA = 32
"""What the product of the thin matrices is multiplied by, over their rank: the best rate is then much the same for
every rank (Schulman 2025, *LoRA Without Regret*)."""
HEADS = ("lm_head", "score")
"""Matrices behind the blocks."""


class LoRALinear(nn.Module):
    """A linear map whose own weights are frozen, and a change of it of rank R that learns: W + ALPHA / R * up down."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen, self.bias, self.scale = linear.weight, linear.bias, ALPHA / rank
        out_features, in_features = linear.weight.shape
        self.down = nn.Parameter(torch.empty_like(linear.weight[:1].expand(rank, in_features)))
        self.up = nn.Parameter(torch.zeros_like(linear.weight[:, :1].expand(out_features, rank)))  # no change yet
        nn.init.uniform_(self.down, -(in_features**-0.5), in_features**-0.5)

    @property
    def weight(self) -> Tensor:
        """The sum, (out, in): what decoders read, and files get."""
        return self.frozen + self.scale * self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), without the sum ever being made."""
        return F.linear(x, self.frozen, self.bias) + self.scale * F.linear(F.linear(x, self.down), self.up)

    def extra_tensors(self) -> dict[str, Tensor]:
        """What the sum does not say, and a run that goes on needs."""
        return {"frozen": self.frozen.detach(), "down": self.down.detach(), "up": self.up.detach()}

    @torch.no_grad()
    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `beside` gave."""
        for name, mine in self.extra_tensors().items():
            mine.copy_(tensors[name])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        """The layer becomes what was loaded; its change begins anew."""
        self.frozen.copy_(state_dict[prefix + "weight"])
        self.up.zero_()
        if self.bias is not None:
            self.bias.copy_(state_dict[prefix + "bias"])


def add_lora(model: nn.Module, rank: int) -> None:
    """Freezes `model`, and gives every matrix of its blocks a change of rank `rank` that learns; in place.

    A scalar head goes on learning as a whole: it is new. The thin matrices come from torch's global generator.

    Raises:
        BardletError: there is no matrix to adapt, or none is so large.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score."))
    layers = [(name, layer) for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and not name.endswith(HEADS)]  # fmt: skip
    if not layers:
        raise BardletError("--lora: this model has no matrices that could be adapted; leave it out")
    most = min(min(layer.weight.shape) for _, layer in layers)
    if rank > most:
        raise BardletError(f"--lora {rank}: this model's matrices have a rank of at most {most} themselves; "
                           "take a lower one, or leave it out to train them whole")
    for name, layer in layers:
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, LoRALinear(layer, rank))
