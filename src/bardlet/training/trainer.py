"""The training step and the loop around it. Nothing here knows a model, a tokenizer or a stage.

An objective is *batches + a loss function*: `fit` asks for the global batch of a step, has `train_step` turn it into an
update, and writes what a run folder holds. The batch, the dropout masks and the learning rate of a step are functions
of the settings and the step's number, so going on from a checkpoint is the same as never having stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.data.batch import Batch
from bardlet.errors import BardletError
from bardlet.run import hf, metrics
from bardlet.runtime.compiler import eager
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Interrupted, Stopped, StopRequest, interruptible, signals
from bardlet.training import optim
from bardlet.training.averaging import _add_to_average, average_weights
from bardlet.training.checkpointing import _finite, save, write_run
from bardlet.training.state import Objective, State, Trainer

log = logging.getLogger("bardlet")


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, objective: Objective,
               config: Settings, dist: Dist, dtype: str) -> tuple[float, float]:
    """One update from one global batch.

    Args:
        model: as `Dist.wrap` returned it.
        batch: the global batch; micro-batches and processes take slices of its rows.
        dtype: fp32 or bf16, the precision of the matrix products.

    Returns:
        (loss, norm): the mean loss in nats over all unmasked targets of the global batch, and the norm of its
        gradient before clipping. When one of them is not finite the weights have not been touched.
    """
    targets = objective.count(batch)
    total = torch.zeros((), device=dist.device)
    for i, micro in enumerate(micro_batches(batch, config.grad_accum, dist)):
        with dist.last_micro_batch(model, i == config.grad_accum - 1):
            with autocast(dtype, dist.device):
                loss_sum = objective.loss(model, micro)
            # a sum over all processes divided by the global count; the wrapper averages over processes: undo that
            (loss_sum * (dist.world / targets)).backward()
        total += loss_sum.detach()
    loss = dist.sum(total).item() / targets
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf).item()
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return loss, norm


def micro_batches(batch: Batch, number: int, dist: Dist) -> Iterator[Batch]:
    """The share of this process in each of `number` slices of a global batch, on its device."""
    rows = len(next(iter(batch.values()))) // number
    for i in range(number):
        yield {name: dist.to_device(x[i * rows : (i + 1) * rows][dist.rows(rows)]) for name, x in batch.items()}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Give PyTorch's generators the state that belongs to this step: dropout is a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def fit(trainer: Trainer, replan: Callable[[State], int | None] = lambda state: None,
        watch: Callable[[dict[str, Any]], None] = lambda line: None, asked: StopRequest | None = None) -> None:
    """Train until the planned number of steps is done, evaluating, logging and saving on the way.

    Args:
        t: what is trained, at the step where it is; it is moved on in place.
        replan: asked before each step; a number is the new count of planned steps, and is recorded.
        watch: called after each step with what a person wants to see.
        asked: of a `signals` that is around this call already, and looks itself at a signal that comes when all steps
            are done; None: `fit` has one of its own.

    Raises:
        Stopped: after a signal; the run has been saved.
        BardletError: a loss, gradient or weight is not finite (the last checkpoint stays as it was).
    """
    wrapped = trainer.dist.wrap(trainer.model)
    state, config = trainer.state, trainer.config
    started = time.monotonic() - state.elapsed
    trainer.model.train()
    if state.step == 0 and trainer.objective.stage_state:
        trainer.objective.stage_state.load({})  # steps may have been timed before
    with signals() if asked is None else nullcontext(asked) as box:
        saved = state.step
        val_loss = _evaluate(trainer, box, asked is None) if _evaluation_due(trainer) else None  # a signal had broken it off
        while True:
            stop = trainer.dist.all_max(box.number)
            if stop and state.step and (asked is None or state.step < state.steps):
                if saved != state.step:
                    save(trainer)
                trainer.dist.broadcast_int(0)  # nobody leaves before rank 0 has saved
                raise Stopped(trainer.run, state.step, stop)
            state.elapsed = time.monotonic() - started
            _replan(trainer, replan)
            if state.step >= state.steps:
                break
            line = _advance(trainer, wrapped)
            state.elapsed = time.monotonic() - started
            last = state.step == state.steps
            if trainer.dist.main and (last or _due(state.step, config.log_every)):
                _log(trainer, line)
            if _evaluation_due(trainer):
                val_loss = _evaluate(trainer, box, asked is None)
            if trainer.dist.main:
                with suppress(OSError) if box.number else nullcontext():  # a terminal that was closed hears nothing
                    watch({**line, "steps": state.steps, "val_loss": val_loss, "seconds": state.seconds,
                           "elapsed": state.elapsed})
            if last or _due(state.step, config.save_every):
                save(trainer)
                saved = state.step
        if trainer.dist.main:
            try:
                with interruptible(box, asked is None):
                    finish(trainer)
            except Interrupted:
                raise Stopped(trainer.run, state.step, box.number) from None


def _advance(trainer: Trainer, wrapped: nn.Module) -> dict[str, Any]:
    """Make the next step, check its numbers and add it to the average. Return its line for the log."""
    state, config, begun = trainer.state, trainer.config, time.monotonic()
    share = optim.learning_rate(state.step, state.steps, config)
    optim.set_learning_rate(trainer.optimizers, share)
    seed_step(config.seed, state.step, trainer.dist.rank)
    batch = trainer.objective.batch(state.step)
    loss, norm = train_step(wrapped, trainer.optimizers, batch, trainer.objective, config, trainer.dist, trainer.machine["dtype"])
    _check_numbers(trainer, wrapped, batch, loss, norm)
    state.step += 1
    state.tokens += trainer.objective.count(batch)
    if math.isfinite(loss):
        state.loss_sum += loss
        state.loss_steps += 1
    if config.keep != "last":
        _add_to_average(trainer)
    state.seconds += time.monotonic() - begun
    return {"step": state.step, "train_loss": loss, "lr": config.lr * share, "grad_norm": norm,
            "tokens": state.tokens, **trainer.objective.metadata()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def _replan(trainer: Trainer, replan: Callable[[State], int | None]) -> None:
    """Take a new number of planned steps from the clock of rank 0, or from the record of the run that is repeated."""
    recorded = dict(trainer.config.replans).get(trainer.state.step)
    steps = recorded or trainer.dist.broadcast_int(replan(trainer.state) or 0)
    before = trainer.state.steps
    if steps and steps != before:
        trainer.state.steps = max(steps, trainer.state.step + 1)
    if not recorded and not 0.8 < trainer.state.steps / before < 1.25:
        log.warning("a step takes %s than when it was planned: %d steps instead of %d end on time",
                    "longer" if trainer.state.steps < before else "less time", trainer.state.steps, before)
    if steps and (trainer.state.step, trainer.state.steps) not in trainer.state.replans:
        trainer.state.replans.append((trainer.state.step, trainer.state.steps))
        write_run(trainer)


def _check_numbers(trainer: Trainer, wrapped: nn.Module, batch: Batch, loss: float, norm: float) -> None:
    """Stop, or count a skipped step, when the loss or the gradient of this step is not finite; stop at a bad weight."""
    sound = math.isfinite(loss) and math.isfinite(norm)
    whole = bool(trainer.dist.all_min(int(_finite(p.detach() for p in trainer.model.parameters()))))
    if sound and whole:
        trainer.state.skipped = 0
        return
    trainer.state.skipped += 1
    what = "a weight" if not whole else "the loss" if not math.isfinite(loss) else "the gradient"
    where = (f"{what} of step {trainer.state.step + 1} is not a finite number ({_describe_fault(trainer, wrapped, batch)}"
             f"{trainer.objective.describe_batch(trainer.state.step)})")
    lower = (f"Take a lower --lr and --muon-lr, or --dtype fp32, in a new run (`bardlet train --config "
             f"{trainer.run / 'run.toml'} --out NEW --lr ...`)")
    if not whole:
        raise BardletError(f"{where}; nothing of it was saved. {lower}; `bardlet resume {trainer.run}` goes on from the last "
                           "checkpoint, if it was the machine's fault")
    if trainer.config.on_nan == "stop" or trainer.state.skipped >= 10:
        raise BardletError(f"{where}; the weights were not touched. {lower}"
                           + ("" if trainer.config.on_nan == "skip" else "; --on-nan skip leaves out such steps"))
    log.warning("%s; the step is skipped (%d in a row)", where, trainer.state.skipped)


def _describe_fault(trainer: Trainer, wrapped: nn.Module, batch: Batch) -> str:
    """Which of several processes has numbers that are not finite: each computes its share again, alone."""
    if trainer.dist.world == 1:
        return ""
    seed_step(trainer.config.seed, trainer.state.step, trainer.dist.rank)
    losses: list[torch.Tensor] = []
    for micro in micro_batches(batch, trainer.config.grad_accum, trainer.dist):
        with trainer.dist.last_micro_batch(wrapped, False), autocast(trainer.machine["dtype"], trainer.dist.device):
            loss = trainer.objective.loss(wrapped, micro)
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    sound = _finite([*losses, *gradients, *(p.detach() for p in trainer.model.parameters())])
    for p in trainer.model.parameters():
        p.grad = None
    ranks = trainer.dist.ranks_where(not sound)
    return f"in process {', '.join(map(str, ranks))} of {trainer.dist.world}, " if ranks else ""


def evaluate(trainer: Trainer) -> float:
    """The validation loss by the weights as they are; the same number in each process."""
    trainer.model.eval()
    try:
        with torch.no_grad(), eager(trainer.model):
            return trainer.objective.evaluate(trainer.model)
    finally:
        trainer.model.train()


def _evaluation_due(trainer: Trainer) -> bool:
    """Whether the step that was just done ends with an evaluation, and has not had it."""
    done = trainer.state.step
    return done > trainer.state.evaluated and (done == trainer.state.steps or _due(done, trainer.config.eval_every))


def _evaluate(trainer: Trainer, asked: StopRequest, may_break: bool) -> float | None:
    """Evaluate, log it, and keep the weights at the root when they are the best so far. None: a signal broke it off."""
    value = None
    with suppress(Interrupted), interruptible(asked, may_break):
        value = evaluate(trainer)
    if trainer.dist.all_max(int(value is None)) or value is None:  # one process was asked to stop: all of them do
        return None
    step = trainer.state.evaluated = trainer.state.step
    if trainer.dist.main:
        metrics.append_metrics(trainer.run, {"step": step, "val_loss": value})
        if trainer.config.keep == "best" and value < trainer.best:
            trainer.best = value
            hf.write_weights(trainer.run, trainer.model.hf_state_dict())
            trainer.record.update(selected_by="best", selected_step=step, val_loss=value, averaged=None)
            write_run(trainer)
    return value


def _log(trainer: Trainer, line: dict[str, Any]) -> None:
    state = trainer.state
    line = {**line, "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else None}
    trainer.record.train_loss = line["train_loss"]
    state.loss_sum, state.loss_steps = 0.0, 0
    metrics.append_metrics(trainer.run, {**line, "seconds": round(state.seconds, 3),
                                      "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1)})


def finish(trainer: Trainer) -> None:
    """Leave at the root the weights that --keep asks for, and put on record which they are.

    The average of the last fifth of the steps is one of those that `best` is chosen from.
    """
    keep, last = trainer.config.keep, trainer.state.step
    chosen = keep == "best" and trainer.best < math.inf
    if keep == "average" or (keep == "best" and trainer.state.averaged > 1):
        with average_weights(trainer):
            value = evaluate(trainer)
            if keep == "average" or value < trainer.best:
                hf.write_weights(trainer.run, trainer.model.hf_state_dict())
                trainer.record.update(selected_by=keep, selected_step=last, val_loss=value, averaged=trainer.state.averaged)
                chosen = True
    if not chosen:  # the last weights were asked for, or no evaluation gave a number to choose by
        lines = [line for line in metrics.read_metrics(trainer.run) if "val_loss" in line]
        hf.write_weights(trainer.run, trainer.model.hf_state_dict())
        value = lines[-1]["val_loss"] if lines else evaluate(trainer)  # none where metrics.jsonl is damaged
        trainer.record.update(selected_by="last", selected_step=last, val_loss=value, averaged=None)
    write_run(trainer)


