"""Optimizers: parameter groups, AdamW, Muon, and the learning-rate schedule.

Muon (Jordan et al., 2024) replaces the update of a matrix by the nearest matrix with orthonormal rows or columns,
approximated by five Newton-Schulz steps. It is meant for the matrices between the embeddings and the head. Those two,
whose rows are looked up one by one, and all vectors stay with AdamW (Loshchilov and Hutter, 2019).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.errors import BardletError
from bardlet.models.lora import HEADS
from bardlet.runtime.device import pick_dtype

log = logging.getLogger("bardlet")

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def parameter_groups(model: nn.Module, muon: bool) -> Groups:
    """Return the trainable parameters in three groups, "muon", "decay" and "no_decay": lists of (name, parameter).

    With `muon`, matrices that are neither an embedding nor a head (HEADS) go to Muon: those of the blocks, or of the
    single layer of a rung without blocks. Other matrices are decayed; norms and biases are not. A tied parameter
    appears once. The groups are asserted to partition the trainable parameters.
    """
    embeddings_and_heads = {
        id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name.endswith(HEADS)}
    groups: Groups = {"muon": [], "decay": [], "no_decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            groups["no_decay"].append((name, p))
        elif muon and p.ndim == 2 and id(p) not in embeddings_and_heads:
            groups["muon"].append((name, p))
        else:
            groups["decay"].append((name, p))
    grouped = [id(p) for group in groups.values() for _, p in group]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    return groups


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
            for shape, weights in shapes.items():
                self._update(weights, group, math.sqrt(max(1, shape[0] / shape[1])))

    def _update(self, weights: list[torch.Tensor], group: dict[str, Any], scale: float) -> None:
        """Update matrices that share a shape."""
        grads = [p.grad for p in weights if p.grad is not None]
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        updates = orthogonalize(torch.stack(list(nesterov))).float()
        # a matrix with zero gradient stays put, undecayed: its remaining momentum, orthogonalized, would make a full
        # step, and a policy whose completions all score the same would drift
        moving_N = torch.stack([grad.any() for grad in grads])
        updates *= moving_N.view(-1, 1, 1)
        decay_N = torch.where(moving_N, 1 - group["lr"] * group["weight_decay"], 1.0)
        torch._foreach_mul_(weights, list(decay_N.unbind()))
        torch._foreach_add_(weights, list(updates.unbind()), alpha=-group["lr"] * scale)


def orthogonalize(g_NRC: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return approximately U V^T for the SVD U S V^T of each of N matrices: (N, R, C), in `dtype`.

    Five Newton-Schulz steps with the coefficients of Jordan et al. (2024): matrix products alone map singular values
    from a few thousandths of the largest upwards to between 0.7 and 1.2, which is close enough.

    dtype: None means bf16 where the processor multiplies it natively, else fp32; emulated bf16 would take longer than
    the rest of the step.
    """
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    native = torch.bfloat16 if pick_dtype("auto", g_NRC.device) == "bf16" else torch.float32
    x = (g_NRC.mT if tall else g_NRC).to(dtype or native)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):  # X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X,  A = X X^T
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def build(model: nn.Module, config: Settings) -> list[torch.optim.Optimizer]:
    """Return a run's optimizers: AdamW alone, or AdamW and Muon for the layers' matrices.

    Each parameter group stores its peak learning rate as `peak_lr`, which `set_learning_rate` scales.
    """
    groups = parameter_groups(model, config.optimizer == "muon")
    parameters = {name: [p for _, p in group] for name, group in groups.items()}
    adamw = AdamW(
        [{"params": parameters["decay"], "weight_decay": config.weight_decay},
         {"params": parameters["no_decay"], "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if parameters["muon"]:
        optimizers.append(Muon(parameters["muon"], config.muon_lr, config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate(step: int, steps: int, config: Settings) -> float:
    """Return the learning rate of step `step` (0 .. steps-1) as a share of the peak.

    A linear warm-up is followed by the schedule: "stable-decay" (WSD: Hu et al., 2024) stays constant, then decays
    linearly over the last `decay_share`; "cosine" (Loshchilov and Hutter, 2017), "linear" and "constant".
    """
    warmup = min(config.warmup_steps, steps // 5)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    low = config.min_lr_ratio
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1 after the warm-up
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "linear":
        return low + (1 - low) * (1 - min(done, 1.0))
    left = (steps - step) / max(1.0, config.decay_share * steps)  # more than 1 on the plateau
    return low + (1 - low) * max(0.0, min(1.0, left))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every parameter group to `share` of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


STATE: dict[type, set[str]] = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
"""State keys of each optimizer, per parameter."""


def state_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the optimizer state as tensors named `PARAMETER/KEY` (model.norm.weight/exp_avg), for safetensors."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value
            for optimizer in optimizers for p, state in optimizer.state.items() for key, value in state.items()}


def load_state_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module,
                       tensors: dict[str, torch.Tensor], where: str) -> None:
    """Load `tensors` (from `state_tensors`) into the optimizers. They must match the model exactly.

    If every step before the save was skipped (--on-nan skip), `tensors` is empty: the optimizers stay fresh, with a
    warning.

    Raises:
        BardletError: naming the file `where` and the first tensor that does not fit.
    """
    if not tensors:
        log.warning("%s: saved before the first optimizer step; the optimizers start fresh", where)
        return
    names = {id(p): name for name, p in model.named_parameters()}
    remaining = dict(tensors)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                prefix = names[id(p)] + "/"
                state = {key.removeprefix(prefix): remaining.pop(key) for key in list(remaining)
                         if key.startswith(prefix)}
                mismatched = [key for key, x in state.items() if x.ndim and x.shape != p.shape]
                if mismatched:
                    raise BardletError(f"{where}: optimizer state {prefix}{mismatched[0]} does not have the shape of "
                                       "its weights; use another checkpoint")
                if state.keys() != STATE[type(optimizer)]:
                    raise BardletError(f"{where}: the optimizer state of {prefix[:-1]} does not belong to "
                                       f"{type(optimizer).__name__}: damaged, or the settings changed; use another "
                                       "checkpoint")
                optimizer.state[p] = {key: x.to(p.device).clone() for key, x in state.items()}
    if remaining:
        raise BardletError(f"{where}: optimizer state {next(iter(remaining))} matches no parameter of this model; use "
                           "another checkpoint")
