"""The training step: one global batch, one update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

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


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, objective: Objective,
               config: Settings, dist: Dist, dtype: str,
               before_update: Callable[[], None] = lambda: None, step: int = 0,
               add_up: Callable[[torch.Tensor], list[float]] | None = None) -> tuple[float, float]:
    """Update the weights once, from one global batch.

    Args:
        model: as `parallelize.wrap` returned it.
        batch: the global batch; micro-batches and ranks take slices of its rows.
        dtype: fp32 or bf16, the precision of matrix products.
        before_update: called when the gradient is there, before a weight changes.
        step: its number, which seeds the dropout of slices.
        add_up: returns the sums over all ranks of a few float64 numbers; None: `Dist.gather` collects them.

    Returns:
        (loss, norm): the summed loss of the global batch, divided by what `objective.count` counts (unmasked targets,
        pairs or completions), and the norm of its gradient before clipping. If either is not finite, the weights are
        unchanged.
    """
    targets, sharded = objective.count(batch), parallelize.is_sharded(model)

    def backward(part: int) -> torch.Tensor:
        """Compute the gradient of one part of the batch, and return its summed loss."""
        if dist.slices:
            seed_step(config.seed, step, part)
        # gradients are averaged over the ranks; times `world`, that is their sum over all targets
        scale = (1 if dist.slices and not sharded else dist.world) / targets
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
        seed_step(config.seed, step, dist.parts)  # the same state on every rank, whatever its slices
    parameters, maximum = [p for p in model.parameters() if p.grad is not None], config.grad_clip or math.inf
    own = [total.double(), *([parallelize.squared_norm(parameters)] if sharded else [])]
    loss_sum, *squared = add_up(torch.stack(own)) if add_up else dist.gather(torch.stack(own)).sum(0).tolist()
    loss = loss_sum / targets
    if sharded:
        norm = math.sqrt(squared[0])
        parallelize.clip(parameters, norm, maximum)
    else:
        norm = nn.utils.clip_grad_norm_(parameters, maximum).item()
    if math.isfinite(loss) and math.isfinite(norm):
        before_update()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return loss, norm


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
