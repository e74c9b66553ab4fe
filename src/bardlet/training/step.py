"""The training step: one global batch, one update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.data.batch import Batch
from bardlet.runtime import parallelize
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.training import slices
from bardlet.training.state import Objective


@dataclass(frozen=True)
class InRun:
    """Details of a step that only a run has to set."""

    before_update: Callable[[], None] = lambda: None
    """Called when the gradient is there, before a weight changes."""
    step: int = 0
    """The number of the step, which seeds the dropout of slices."""
    add_up: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Returns the sums over all ranks of a few numbers; None: `Dist.gather` collects them."""
    loss_scale: float = 1.0
    """Factor of the loss in the backward pass, against gradients that round to zero in fp16."""


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, objective: Objective,
               config: Settings, dist: Dist, dtype: str, in_run: InRun = InRun()) -> tuple[float, float]:
    """Update the weights once, from one global batch.

    Args:
        model: as `parallelize.wrap` returned it.
        batch: the global batch; micro-batches and ranks take slices of its rows.
        dtype: fp32, bf16 or fp16, the precision of matrix products.

    Returns:
        (loss, norm): the summed loss of the global batch, divided by what `objective.count` counts (unmasked targets,
        pairs or completions), and the norm of its gradient before clipping. If either is not finite, the weights are
        unchanged.
    """
    loss, norm = launch_step(model, optimizers, batch, objective, config, dist, dtype, in_run).tolist()
    return loss, norm


def launch_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, objective: Objective,
                config: Settings, dist: Dist, dtype: str, in_run: InRun = InRun(), look: bool = True) -> torch.Tensor:
    """Start a `train_step`, and return loss and norm as a tensor (2,) on the device, float64.

    look: wait for the device to learn whether they are finite. Otherwise the weights are updated in any case, and a GPU
    need not wait for the processor.
    """
    targets, sharded = objective.count(batch), parallelize.is_sharded(model)

    def backward(part: int) -> torch.Tensor:
        """Compute the gradient of one part of the batch, and return its summed loss."""
        if dist.slices:
            seed_step(config.seed, in_run.step, part)
        # gradients are averaged over the ranks; times `world`, that is their sum over all targets
        scale = in_run.loss_scale * (1 if dist.slices and not sharded else dist.world) / targets
        total = torch.zeros((), device=dist.device)
        for i, micro in enumerate(micro_batches(batch, config.grad_accum, dist, part)):
            with parallelize.micro_batch(model, i == config.grad_accum - 1):
                with autocast(dtype, dist.device):
                    loss = objective.loss(model, micro)
                (loss * scale).backward()
            total += loss.detach()
        return total

    if dist.slices and not sharded:
        total = slices.add_gradients(model, backward, dist) / dist.world  # it has the sum already
    else:
        total = torch.stack([backward(part) for part in dist.own_parts]).sum()
    if dist.slices:
        seed_step(config.seed, in_run.step, dist.parts)  # the same state on every rank, whatever its slices
    parameters, maximum = [p for p in model.parameters() if p.grad is not None], config.grad_clip or math.inf
    if in_run.loss_scale != 1:
        torch._foreach_mul_([parallelize.local(p.grad) for p in parameters], 1 / in_run.loss_scale)
    wide = torch.float32 if dist.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    own = [total.to(wide), *([parallelize.squared_norm(parameters)] if sharded else [])]
    add_up = in_run.add_up or (lambda numbers: dist.gather(numbers).sum(0))
    loss_sum, *squared = add_up(torch.stack(own)).unbind()
    if sharded:
        norm = squared[0].sqrt()
        parallelize.clip(parameters, norm, maximum)
    else:
        norm = nn.utils.clip_grad_norm_(parameters, maximum)
    figures = torch.stack((loss_sum / targets, norm.to(wide)))
    if not look or figures.isfinite().all():
        in_run.before_update()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return figures


def micro_batches(batch: Batch, number: int, dist: Dist, part: int) -> Iterator[Batch]:
    """Yield a part of each of `number` slices of a global batch, on this rank's device."""
    rows = len(next(iter(batch.values()))) // number
    size = rows // dist.parts
    for i in range(number):
        start = i * rows + part * size
        yield {name: dist.to_device(x[start : start + size]) for name, x in batch.items()}


def seed_step(seed: int, step: int, part: int) -> None:
    """Seed PyTorch's generators for a step, so that dropout is a function of (seed, step, part of the batch)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0] >> 1))
