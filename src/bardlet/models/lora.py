"""LoRA: a frozen matrix plus the trainable product of two thin ones.

Hu et al. (2021), *LoRA: Low-Rank Adaptation of Large Language Models*. From outside, an adapted layer has one matrix,
the sum: in `weight`, in `state_dict()`, and so in every file that bardlet writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.errors import BardletError

ALPHA = 32
"""The product of the thin matrices is scaled by ALPHA / rank, so that the best learning rate barely depends on the rank
(Schulman 2025, *LoRA Without Regret*)."""
HEADS = ("lm_head", "score")
"""Heads after the blocks, which LoRA does not adapt."""


@torch.library.custom_op("bardlet::frozen_product", mutates_args=())
def frozen_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T with a frozen W (out, in) of fewer bits than x (..., in), which is widened for the product.

    It is a custom operator because the compiler would keep the widened matrices of a whole model for the backward pass.
    """
    return F.linear(x, weight.to(x.dtype))


@frozen_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _keep_weight(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    [weight] = ctx.saved_tensors
    return grad @ weight.to(grad.dtype), None


frozen_product.register_autograd(_gradient, setup_context=_keep_weight)


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight W and a trainable update of rank R: W + ALPHA / R * up @ down.

    W stays in bf16 if it is stored so; the update is fp32.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen, self.bias, self.scale = linear.weight, linear.bias, ALPHA / rank
        out_features, in_features = linear.weight.shape
        dtype, device = torch.promote_types(linear.weight.dtype, torch.float32), linear.weight.device
        self.down = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))  # no update yet
        nn.init.uniform_(self.down, -(in_features**-0.5), in_features**-0.5)

    @property
    def weight(self) -> Tensor:
        """The merged weight, (out, in), for decoders and files."""
        return self.frozen.to(self.up.dtype) + self.scale * self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out) without computing the merged weight."""
        if torch.is_autocast_enabled(x.device.type):  # once, for all three products
            x = x.to(torch.get_autocast_dtype(x.device.type))
        update = self.scale * F.linear(F.linear(x, self.down), self.up)
        if self.frozen.dtype == self.up.dtype:
            return F.linear(x, self.frozen, self.bias) + update
        product = F.linear if self.frozen.dtype == x.dtype else frozen_product
        y = product(x, self.frozen) + update
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs besides the merged weight."""
        return {"frozen": self.frozen.detach(), "down": self.down.detach(), "up": self.up.detach()}

    @torch.no_grad()
    def load_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors from `extra_tensors`."""
        self.frozen.data = tensors["frozen"].to(self.frozen.device)
        self.down.copy_(tensors["down"])
        self.up.copy_(tensors["up"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        """Load the merged weight as the frozen one and reset the update to zero."""
        self.frozen.data = state_dict[prefix + "weight"].to(self.frozen.device, copy=True)  # in all its bits
        self.up.zero_()
        if self.bias is not None:
            self.bias.copy_(state_dict[prefix + "bias"])


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze `model` in place and give every matrix of its blocks a trainable update of rank `rank`.

    A scalar head is new, so all of it stays trainable. The thin matrices come from torch's global generator.

    Raises:
        BardletError: there is no matrix to adapt, or a matrix is smaller than the rank.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score."))
    layers = [(name, layer) for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and not name.endswith(HEADS)]  # fmt: skip
    if not layers:
        raise BardletError("--lora: this model has no matrices to adapt; drop it")
    max_rank = min(min(layer.weight.shape) for _, layer in layers)
    if rank > max_rank:
        raise BardletError(f"--lora {rank}: the rank must be at most {max_rank} for this model; "
                           "use a lower one, or drop it to train all weights")
    for name, layer in layers:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoRALinear(layer, rank))
    frozen = {id(module.frozen) for module in model.modules() if isinstance(module, LoRALinear)}
    for parameter in model.parameters():  # embeddings, norms and biases begin and scale the residual stream, in fp32
        if parameter.dtype == torch.bfloat16 and id(parameter) not in frozen:
            parameter.data = parameter.data.float()
