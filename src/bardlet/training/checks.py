"""Losses, gradients and weights that are not finite numbers: which step and which process made them."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from bardlet.data.batch import Batch
from bardlet.errors import BardletError, quoted
from bardlet.runtime import parallelize
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.training.checkpointing import all_finite
from bardlet.training.state import Trainer
from bardlet.training.step import micro_batches, seed_step
from bardlet.training.together import Together

log = logging.getLogger("bardlet")

LOOK_EVERY = {"cuda": 10}
"""Steps from one look at loss and gradient to the next, by device: a GPU would wait for the processor each time."""


def looks_at(trainer: Trainer, step: int) -> bool:
    """Return True if the numbers of a step (from 0) are looked at before the update, and not only some steps later."""
    c, done, every = trainer.config, step + 1, LOOK_EVERY.get(trainer.dist.device.type, 1)
    if c.on_nan == "skip" or trainer.machine["dtype"] == "fp16" or done == trainer.state.steps:
        return True
    return any(n and done % n == 0 for n in (every, c.log_every, c.eval_every, c.save_every))


def read(trainer: Trainer, together: Together) -> None:
    """Look at the numbers of the steps that were not looked at yet. Raise BardletError if one is not finite."""
    if not trainer.unread:
        return
    figures: list[list[float]] = torch.stack(trainer.unread).tolist()
    trainer.unread.clear()
    together.read()
    done = trainer.state.step
    for step, (loss, norm) in enumerate(figures, done - len(figures)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            trainer.updating = True  # nothing is saved any more
            raise BardletError(f"{_culprit(loss)} of step {step + 1} is not a finite number "
                               f"({trainer.objective.describe_batch(step)}); noticed after step {done}. "
                               f"`bardlet resume {quoted(trainer.run)}` continues from the last checkpoint, which is "
                               f"sound. {_advice(trainer)}")
        trainer.count_loss(loss)
        trainer.last = loss, norm


def _culprit(loss: float) -> str:
    return "the gradient" if math.isfinite(loss) else "the loss"


def weights_are_finite(trainer: Trainer) -> bool:
    """Return True if every weight of this process is a finite number."""
    return all_finite(parallelize.local(p.detach()) for p in trainer.model.parameters())


def check_weights(trainer: Trainer) -> None:
    """Raise BardletError if the weights of another process are not finite; `save` checks those it writes."""
    if trainer.dist.world > 1 and (faulty := trainer.dist.ranks_where(not weights_are_finite(trainer))):
        raise _faulty_weights(trainer, faulty, trainer.state.step)


def _faulty_weights(trainer: Trainer, faulty: list[int], step: int) -> BardletError:
    """Return the error that names a step and the processes whose weights it made infinite or NaN."""
    processes = _processes(faulty, trainer.dist)
    return BardletError(f"a weight of step {step} is not a finite number ({processes}"
                        f"{trainer.objective.describe_batch(step - 1)}); this step was not saved. {_advice(trainer)}. "
                        f"If the hardware was at fault, `bardlet resume {quoted(trainer.run)}` continues from the last "
                        "checkpoint")


def _advice(trainer: Trainer) -> str:
    return ("Start a new run with a lower --lr and --muon-lr, or with --dtype fp32 (`bardlet train --config "
            f"{quoted(trainer.run / 'run.toml')} --out NEW --lr ...`)")


def _processes(ranks: list[int], dist: Dist) -> str:
    """Return the beginning of a description that names processes, if there are several."""
    return f"in process {', '.join(map(str, ranks))} of {dist.world}, " if ranks and dist.world > 1 else ""


def check_numbers(trainer: Trainer, wrapped: nn.Module, batch: Batch, figures: tuple[float, float],
                  faulty: list[int]) -> None:
    """Raise, or count a skipped step, if the loss or gradient is not finite; always raise for a weight.

    Args:
        figures: loss and norm of the gradient.
        faulty: the ranks whose weights are not finite; of several processes, since the step before.
    """
    (loss, norm), done = figures, trainer.state.step
    if faulty:
        raise _faulty_weights(trainer, faulty, done + (trainer.dist.world == 1))
    if math.isfinite(loss) and math.isfinite(norm):
        trainer.state.skipped = 0
        return
    trainer.state.skipped += 1
    problem = (f"{_culprit(loss)} of step {done + 1} is not a finite number "
               f"({_describe_fault(trainer, wrapped, batch)}{trainer.objective.describe_batch(done)})")
    if trainer.config.on_nan == "stop" or trainer.state.skipped >= 10:
        raise BardletError(f"{problem}; the weights are unchanged. {_advice(trainer)}"
                           + ("" if trainer.config.on_nan == "skip" else ", or skip such steps with --on-nan skip"))
    log.warning("%s; skipped this step (%d in a row)", problem, trainer.state.skipped)


def _describe_fault(trainer: Trainer, wrapped: nn.Module, batch: Batch) -> str:
    """Name the processes (ranks) whose numbers are not finite: each rank recomputes its share alone."""
    if trainer.dist.world == 1:
        return ""
    losses: list[torch.Tensor] = []
    for part in trainer.dist.own_parts:
        seed_step(trainer.config.seed, trainer.state.step, part)
        for micro in micro_batches(batch, trainer.config.grad_accum, trainer.dist, part):
            with parallelize.micro_batch(wrapped, False), autocast(trainer.machine["dtype"], trainer.dist.device):
                loss = trainer.objective.loss(wrapped, micro)
            loss.backward()
            losses.append(loss.detach())
    sharded = parallelize.is_sharded(trainer.model)  # then gradients are sums over all ranks
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None and not sharded]
    finite = all_finite([*losses, *gradients])
    for p in trainer.model.parameters():
        p.grad = None
    return _processes(trainer.dist.ranks_where(not finite), trainer.dist)
