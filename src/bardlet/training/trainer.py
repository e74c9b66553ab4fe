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
from bardlet.runtime.signals import Asked, BrokenOff, Stopped, breakable, signals
from bardlet.training import optim
from bardlet.training.averaging import _add_to_average, averaged
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
        yield {name: dist.put(x[i * rows : (i + 1) * rows][dist.rows(rows)]) for name, x in batch.items()}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Give PyTorch's generators the state that belongs to this step: dropout is a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def fit(t: Trainer, replan: Callable[[State], int | None] = lambda state: None,
        watch: Callable[[dict[str, Any]], None] = lambda line: None, asked: Asked | None = None) -> None:
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
    wrapped = t.dist.wrap(t.model)
    state, config = t.state, t.config
    started = time.monotonic() - state.elapsed
    t.model.train()
    if state.step == 0 and t.objective.memory:
        t.objective.memory.load({})  # steps may have been timed before
    with signals() if asked is None else nullcontext(asked) as box:
        saved = state.step
        val_loss = _evaluate(t, box, asked is None) if _evaluation_due(t) else None  # a signal had broken it off
        while True:
            stop = t.dist.most(box.number)
            if stop and state.step and (asked is None or state.step < state.steps):
                if saved != state.step:
                    save(t)
                t.dist.from_main(0)  # nobody leaves before rank 0 has saved
                raise Stopped(t.run, state.step, stop)
            state.elapsed = time.monotonic() - started
            _replan(t, replan)
            if state.step >= state.steps:
                break
            line = _advance(t, wrapped)
            state.elapsed = time.monotonic() - started
            last = state.step == state.steps
            if t.dist.main and (last or _due(state.step, config.log_every)):
                _log(t, line)
            if _evaluation_due(t):
                val_loss = _evaluate(t, box, asked is None)
            if t.dist.main:
                with suppress(OSError) if box.number else nullcontext():  # a terminal that was closed hears nothing
                    watch({**line, "steps": state.steps, "val_loss": val_loss, "seconds": state.seconds,
                           "elapsed": state.elapsed})
            if last or _due(state.step, config.save_every):
                save(t)
                saved = state.step
        if t.dist.main:
            try:
                with breakable(box, asked is None):
                    finish(t)
            except BrokenOff:
                raise Stopped(t.run, state.step, box.number) from None


def _advance(t: Trainer, wrapped: nn.Module) -> dict[str, Any]:
    """Make the next step, check its numbers and add it to the average. Return its line for the log."""
    state, config, begun = t.state, t.config, time.monotonic()
    share = optim.learning_rate(state.step, state.steps, config)
    optim.set_learning_rate(t.optimizers, share)
    seed_step(config.seed, state.step, t.dist.rank)
    batch = t.objective.batch(state.step)
    loss, norm = train_step(wrapped, t.optimizers, batch, t.objective, config, t.dist, t.machine["dtype"])
    _check_numbers(t, wrapped, batch, loss, norm)
    state.step += 1
    state.tokens += t.objective.count(batch)
    if math.isfinite(loss):
        state.loss_sum += loss
        state.loss_steps += 1
    if config.keep != "last":
        _add_to_average(t)
    state.seconds += time.monotonic() - begun
    return {"step": state.step, "train_loss": loss, "lr": config.lr * share, "grad_norm": norm,
            "tokens": state.tokens, **t.objective.facts()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def _replan(t: Trainer, replan: Callable[[State], int | None]) -> None:
    """Take a new number of planned steps from the clock of rank 0, or from the record of the run that is repeated."""
    recorded = dict(t.config.replans).get(t.state.step)
    steps = recorded or t.dist.from_main(replan(t.state) or 0)
    before = t.state.steps
    if steps and steps != before:
        t.state.steps = max(steps, t.state.step + 1)
    if not recorded and not 0.8 < t.state.steps / before < 1.25:
        log.warning("a step takes %s than when it was planned: %d steps instead of %d end on time",
                    "longer" if t.state.steps < before else "less time", t.state.steps, before)
    if steps and (t.state.step, t.state.steps) not in t.state.replans:
        t.state.replans.append((t.state.step, t.state.steps))
        write_run(t)


def _check_numbers(t: Trainer, wrapped: nn.Module, batch: Batch, loss: float, norm: float) -> None:
    """Stop, or count a skipped step, when the loss or the gradient of this step is not finite; stop at a bad weight."""
    sound = math.isfinite(loss) and math.isfinite(norm)
    whole = bool(t.dist.least(int(_finite(p.detach() for p in t.model.parameters()))))
    if sound and whole:
        t.state.skipped = 0
        return
    t.state.skipped += 1
    what = "a weight" if not whole else "the loss" if not math.isfinite(loss) else "the gradient"
    where = (f"{what} of step {t.state.step + 1} is not a finite number ({_at_fault(t, wrapped, batch)}"
             f"{t.objective.place(t.state.step)})")
    lower = (f"Take a lower --lr and --muon-lr, or --dtype fp32, in a new run (`bardlet train --config "
             f"{t.run / 'run.toml'} --out NEW --lr ...`)")
    if not whole:
        raise BardletError(f"{where}; nothing of it was saved. {lower}; `bardlet resume {t.run}` goes on from the last "
                           "checkpoint, if it was the machine's fault")
    if t.config.on_nan == "stop" or t.state.skipped >= 10:
        raise BardletError(f"{where}; the weights were not touched. {lower}"
                           + ("" if t.config.on_nan == "skip" else "; --on-nan skip leaves out such steps"))
    log.warning("%s; the step is skipped (%d in a row)", where, t.state.skipped)


def _at_fault(t: Trainer, wrapped: nn.Module, batch: Batch) -> str:
    """Which of several processes has numbers that are not finite: each computes its share again, alone."""
    if t.dist.world == 1:
        return ""
    seed_step(t.config.seed, t.state.step, t.dist.rank)
    losses: list[torch.Tensor] = []
    for micro in micro_batches(batch, t.config.grad_accum, t.dist):
        with t.dist.last_micro_batch(wrapped, False), autocast(t.machine["dtype"], t.dist.device):
            loss = t.objective.loss(wrapped, micro)
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad for p in t.model.parameters() if p.grad is not None]
    sound = _finite([*losses, *gradients, *(p.detach() for p in t.model.parameters())])
    for p in t.model.parameters():
        p.grad = None
    ranks = t.dist.which(not sound)
    return f"in process {', '.join(map(str, ranks))} of {t.dist.world}, " if ranks else ""


def evaluate(t: Trainer) -> float:
    """The validation loss by the weights as they are; the same number in each process."""
    t.model.eval()
    try:
        with torch.no_grad(), eager(t.model):
            return t.objective.evaluate(t.model)
    finally:
        t.model.train()


def _evaluation_due(t: Trainer) -> bool:
    """Whether the step that was just done ends with an evaluation, and has not had it."""
    done = t.state.step
    return done > t.state.evaluated and (done == t.state.steps or _due(done, t.config.eval_every))


def _evaluate(t: Trainer, asked: Asked, may_break: bool) -> float | None:
    """Evaluate, log it, and keep the weights at the root when they are the best so far. None: a signal broke it off."""
    value = None
    with suppress(BrokenOff), breakable(asked, may_break):
        value = evaluate(t)
    if t.dist.most(int(value is None)) or value is None:  # one process was asked to stop: all of them do
        return None
    step = t.state.evaluated = t.state.step
    if t.dist.main:
        metrics.append_metrics(t.run, {"step": step, "val_loss": value})
        if t.config.keep == "best" and value < t.best:
            t.best = value
            hf.write_weights(t.run, t.model.hf_state_dict())
            t.record.update(selected_by="best", selected_step=step, val_loss=value, averaged=None)
            write_run(t)
    return value


def _log(t: Trainer, line: dict[str, Any]) -> None:
    state = t.state
    line = {**line, "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else None}
    t.record.train_loss = line["train_loss"]
    state.loss_sum, state.loss_steps = 0.0, 0
    metrics.append_metrics(t.run, {**line, "seconds": round(state.seconds, 3),
                                      "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1)})


def finish(t: Trainer) -> None:
    """Leave at the root the weights that --keep asks for, and put on record which they are.

    The average of the last fifth of the steps is one of those that `best` is chosen from.
    """
    keep, last = t.config.keep, t.state.step
    chosen = keep == "best" and t.best < math.inf
    if keep == "average" or (keep == "best" and t.state.averaged > 1):
        with averaged(t):
            value = evaluate(t)
            if keep == "average" or value < t.best:
                hf.write_weights(t.run, t.model.hf_state_dict())
                t.record.update(selected_by=keep, selected_step=last, val_loss=value, averaged=t.state.averaged)
                chosen = True
    if not chosen:  # the last weights were asked for, or no evaluation gave a number to choose by
        lines = [line for line in metrics.read_metrics(t.run) if "val_loss" in line]
        hf.write_weights(t.run, t.model.hf_state_dict())
        value = lines[-1]["val_loss"] if lines else evaluate(t)  # none where metrics.jsonl is damaged
        t.record.update(selected_by="last", selected_step=last, val_loss=value, averaged=None)
    write_run(t)


