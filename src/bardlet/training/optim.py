"""A run's optimizers: the parameters of each, their state in files, and the learning-rate schedule.

Muon is meant for the matrices between the embeddings and the head. Those two, whose rows are looked up one by one, and
all vectors stay with AdamW.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.errors import BardletError
from bardlet.models.lora import HEADS
from bardlet.runtime import parallelize
from bardlet.runtime.distributed import Dist
from bardlet.training.optimizers import AdamW, Muon
from bardlet.training.shared_muon import SharedMuon

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


def freeze_biases(model: nn.Module) -> None:
    """Keep the biases of a model's layers as they are, in a new model zero."""
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            p.requires_grad_(False)


def build(model: nn.Module, config: Settings, dist: Dist | None = None) -> list[torch.optim.Optimizer]:
    """Return a run's optimizers: AdamW alone, or AdamW and Muon for the layers' matrices.

    dist: the processes of the run, among which Muon divides its work; None: this one alone.

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
        if dist and (dist.world > 1 or dist.slices):
            optimizers.append(SharedMuon(parameters["muon"], config.muon_lr, config.weight_decay, dist))
        else:
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


def state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of an optimizer's state of a parameter."""
    return {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}


def state_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the optimizer state as tensors named `PARAMETER/KEY` (model.norm.weight/exp_avg), for safetensors."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value
            for optimizer in optimizers for p, state in optimizer.state.items() for key, value in state.items()}


def load_state_tensors(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module,
                       tensors: Mapping[str, torch.Tensor], where: str) -> None:
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
    remaining = set(tensors)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                prefix = names[id(p)] + "/"
                found = sorted(key for key in remaining if key.startswith(prefix))
                remaining.difference_update(found)
                state = {key.removeprefix(prefix): tensors[key] for key in found}
                mismatched = [key for key, x in state.items() if x.ndim and x.shape != p.shape]
                if mismatched:
                    raise BardletError(f"{where}: optimizer state {prefix}{mismatched[0]} does not have the shape of "
                                       "its weights; use another checkpoint")
                if state.keys() != state_keys(optimizer):
                    name = "Muon" if isinstance(optimizer, Muon) else "AdamW"
                    raise BardletError(f"{where}: the optimizer state of {prefix[:-1]} does not belong to {name}: "
                                       "damaged, or the settings changed; use another checkpoint")
                placed = {key: x.to(p.device) for key, x in state.items()}
                optimizer.state[p] = {key: (parallelize.cut_like(x, p) if x.ndim else x).clone()
                                      for key, x in placed.items()}
    if remaining:
        raise BardletError(f"{where}: optimizer state {min(remaining)} matches no parameter of this model; use "
                           "another checkpoint")
