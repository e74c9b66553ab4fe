"""Which parameters are trained how: groups, AdamW, Muon, and the learning rate as a function of the step.

Muon (Jordan et al., 2024) replaces the update of a matrix by the nearest matrix with orthonormal rows or columns,
found by five Newton-Schulz steps. It is made for the matrices inside the blocks; embeddings and the head, whose rows
are looked up one by one, and vectors stay with AdamW (Loshchilov and Hutter, 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from bardlet.config import TrainConfig
from bardlet.errors import BardletError

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def parameter_groups(model: nn.Module, muon: bool) -> Groups:
    """The parameters of `model` in three groups: "muon", "decay" and "no_decay", each a list of (name, parameter).

    Matrices of the blocks go to Muon when `muon`; other matrices and embeddings are decayed; norms and biases are not.
    A tied parameter appears once. The groups are asserted to partition the model's parameters.
    """
    in_blocks = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    groups: Groups = {"muon": [], "decay": [], "no_decay": []}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            groups["no_decay"].append((name, p))
        elif muon and p.ndim == 2 and id(p) in in_blocks:
            groups["muon"].append((name, p))
        else:
            groups["decay"].append((name, p))
    placed = [id(p) for group in groups.values() for _, p in group]
    assert len(placed) == len(set(placed)) and set(placed) == {id(p) for p in model.parameters()}
    return groups


def build(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: AdamW alone, or Muon for the matrices of the blocks beside it.

    Each parameter group carries its peak learning rate as `peak_lr`; `set_learning_rate` scales it.
    """
    groups = parameter_groups(model, config.optimizer == "muon")
    parameters = {name: [p for _, p in group] for name, group in groups.items()}
    adamw = torch.optim.AdamW(
        [{"params": parameters["decay"], "weight_decay": config.weight_decay},
         {"params": parameters["no_decay"], "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if parameters["muon"]:
        optimizers.append(torch.optim.Muon(parameters["muon"], lr=config.muon_lr, momentum=0.95, nesterov=True,
                                           weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (0 .. steps-1) as a share of the peak: a pure function.

    A linear warm-up, then one of: constant and a linear decay over the last `decay_share` (stable-decay, also known
    as WSD: Hu et al., 2024), half a cosine (Loshchilov and Hutter, 2017), a straight line, or nothing.
    """
    warmup = min(config.warmup_steps, steps // 5)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    low = config.min_lr_ratio
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1 over what follows the warm-up
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "linear":
        return low + (1 - low) * (1 - min(done, 1.0))
    left = (steps - step) / max(1.0, config.decay_share * steps)  # more than 1 on the plateau
    return low + (1 - low) * max(0.0, min(1.0, left))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Put every parameter group at `share` of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def state_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizers' state as tensors named `PARAMETER/KEY` (model.norm.weight/exp_avg): what safetensors can hold."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value
            for optimizer in optimizers for p, state in optimizer.state.items() for key, value in state.items()}


def load_state_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module,
                       tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put `tensors` (from `state_tensors`) back. Fewer, more or other tensors than the model has is an error.

    Raises:
        BardletError: naming the first parameter of `where` that does not fit.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    left = dict(tensors)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                prefix = names[id(p)] + "/"
                mine = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
                odd = [key for key, t in mine.items() if t.ndim and t.shape != p.shape]
                if odd:
                    raise BardletError(f"{where}: the optimizer's {prefix}{odd[0]} has another shape than the weights")
                if mine:
                    optimizer.state[p] = {k: t.to(p.device).clone() for k, t in mine.items()}
    if left:
        raise BardletError(f"{where}: the optimizer's {next(iter(left))} belongs to no parameter of this model")
