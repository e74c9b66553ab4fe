"""AdamW (Loshchilov and Hutter, 2019) and Muon (Jordan et al., 2024).

Muon replaces the update of a matrix by the nearest matrix with orthonormal rows or columns, approximated by five
Newton-Schulz steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bardlet.runtime.device import pick_dtype


class Optimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer without its torch.compile guards, whose first use imports the compiler (1 s and 70 MB).

    Bardlet never compiles an optimizer.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter, 2019)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        inspect.unwrap(torch.optim.AdamW.step)(self)


class Muon(Optimizer):
    """Muon (Jordan et al., 2024) for a list of matrices, batched by shape.

    It matches torch.optim.Muon, except for a matrix with zero gradient: Nesterov momentum, orthogonalized, times
    sqrt(rows / columns) for a tall matrix. torch's small per-matrix products leave CPU cores waiting for each other;
    here all matrices of one shape are one batched product. State per parameter: `momentum_buffer`, in its shape.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for weights in shapes.values():
                self._update(weights, [p.grad for p in weights if p.grad is not None],
                             [self.state[p]["momentum_buffer"] for p in weights], group)

    def _update(self, weights: list[torch.Tensor], grads: list[torch.Tensor], momenta: list[torch.Tensor],
                group: dict[str, Any]) -> None:
        """Update matrices that share a shape, and their momenta."""
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov_NRC = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))
        updates_NRC, moving_N = self._directions(nesterov_NRC, torch.stack(torch._foreach_norm(grads, math.inf)) != 0)
        # a matrix with zero gradient stays put, undecayed: its remaining momentum, orthogonalized, would make a full
        # step, and a policy whose completions all score the same would drift
        updates_NRC *= moving_N.view(-1, 1, 1)
        decay_N = torch.where(moving_N, 1 - group["lr"] * group["weight_decay"], 1.0)
        torch._foreach_mul_(weights, list(decay_N.unbind()))
        torch._foreach_add_(weights, list(updates_NRC.unbind()), alpha=-group["lr"] * self._scale(weights[0]))

    def _directions(self, nesterov_NRC: torch.Tensor, moving_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the orthogonalized matrices in their dtype, and which of them have a gradient (`moving_N`)."""
        return orthogonalize(nesterov_NRC).to(nesterov_NRC.dtype), moving_N

    def _scale(self, weight: torch.Tensor) -> float:
        """Return the factor of an update: sqrt(rows / columns) of a tall matrix."""
        return math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))


def orthogonalize(g_NRC: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return approximately U V^T for the SVD U S V^T of each of N matrices: (N, R, C), in `dtype`.

    Five Newton-Schulz steps with the coefficients of Jordan et al. (2024): matrix products alone map singular values
    from a few thousandths of the largest upwards to between 0.7 and 1.2, which is close enough.

    dtype: None means bf16 for fp32 matrices where the processor multiplies bf16 natively, else their own; emulated
    bf16 would take longer than the rest of the step.
    """
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    fast = g_NRC.dtype == torch.float32 and pick_dtype("auto", g_NRC.device) == "bf16"
    x = (g_NRC.mT if tall else g_NRC).to(dtype or (torch.bfloat16 if fast else g_NRC.dtype))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):  # X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X,  A = X X^T
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
