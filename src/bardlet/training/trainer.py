"""The training step and the training loop, independent of model, tokenizer and stage.

An objective is *batches + a loss function*: `fit` fetches the global batch of a step, updates the weights, and writes
the run folder. The batch, dropout masks and learning rate of a step depend only on the settings and the step number, so
resuming from a checkpoint gives the same result as never stopping.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from bardlet.config.settings import Settings
from bardlet.data.batch import Batch
from bardlet.errors import BardletError, quoted
from bardlet.run import hf, metrics
from bardlet.runtime.compiler import eager
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Interrupted, Stopped, StopRequest, interruptible, signals
from bardlet.training import optim, slices
from bardlet.training.averaging import add_to_average, average_weights
from bardlet.training.checkpointing import all_finite, save, write_run
from bardlet.training.state import Objective, State, Trainer

log = logging.getLogger("bardlet")

SIGPIPE = 13
"""The number of the signal of a closed pipe, which Windows lacks."""


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, objective: Objective,
               config: Settings, dist: Dist, dtype: str,
               before_update: Callable[[], None] = lambda: None, step: int = 0) -> tuple[float, float]:
    """Update the weights once, from one global batch.

    Args:
        model: as `Dist.wrap` returned it.
        batch: the global batch; micro-batches and ranks take slices of its rows.
        dtype: fp32 or bf16, the precision of matrix products.
        before_update: called when the gradient is there, before a weight changes.
        step: its number, which seeds the dropout of slices.

    Returns:
        (loss, norm): the summed loss of the global batch, divided by what `objective.count` counts (unmasked targets,
        pairs or completions), and the norm of its gradient before clipping. If either is not finite, the weights are
        unchanged.
    """
    targets = objective.count(batch)

    def backward(part: int) -> torch.Tensor:
        """Compute the gradient of one part of the batch, and return its summed loss."""
        if dist.slices:
            seed_step(config.seed, step, part)
        # DDP averages the gradients over the ranks; times `world`, that is their sum over all targets
        scale = (1 if dist.slices else dist.world) / targets
        total = torch.zeros((), device=dist.device)
        for i, micro in enumerate(micro_batches(batch, config.grad_accum, dist, part)):
            with dist.last_micro_batch(model, i == config.grad_accum - 1):
                with autocast(dtype, dist.device):
                    loss_sum = objective.loss(model, micro)
                (loss_sum * scale).backward()
            total += loss_sum.detach()
        return total

    if dist.slices:
        total = slices.add_gradients(model, backward, dist)
        seed_step(config.seed, step, dist.parts)  # the same state on every rank, whatever its slices
    else:
        total = dist.sum(backward(dist.rank))
    loss = total.item() / targets
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf).item()
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


def fit(trainer: Trainer, replan: Callable[[State], int | None] = lambda state: None,
        watch: Callable[[dict[str, Any]], None] = lambda line: None, stop_request: StopRequest | None = None,
        replanned: Callable[[], str] = lambda: "") -> None:
    """Train for the planned number of steps, evaluating, logging and saving on the way.

    Args:
        trainer: updated in place, starting from its current step.
        replan: called before each step. It may return a new number of planned steps, which is recorded.
        watch: called after each step with values to display.
        replanned: called after the number of steps changed; returns what follows from it, for the message.
        stop_request: of a surrounding `signals` context, which handles signals after the last step; None: an own one.

    Raises:
        Stopped: after a signal; the run has been saved.
        BardletError: a loss, gradient or weight is not finite; the last checkpoint is unaffected.
    """
    owns_signals, wrapped = stop_request is None, trainer.dist.wrap(trainer.model)
    state, config = trainer.state, trainer.config
    started = time.monotonic() - state.elapsed
    trainer.model.train()
    if state.step == 0 and trainer.objective.stage_state:
        trainer.objective.stage_state.load({})  # timing steps may have changed it
    with signals() if stop_request is None else nullcontext(stop_request) as request, _saving_on_error(trainer):
        saved = state.step
        # a resumed run starts with the evaluation in which it was stopped
        val_loss = _evaluate(trainer, request, owns_signals) if _evaluation_due(trainer) else None
        while True:
            stop = trainer.dist.all_max(request.number)
            if stop and state.step and (owns_signals or state.step < state.steps):
                if saved != state.step:
                    save(trainer)
                trainer.dist.broadcast_int(0)  # no rank leaves before rank 0 has saved
                raise Stopped(trainer.run, state.step, stop)
            state.elapsed = time.monotonic() - started
            _replan(trainer, replan, replanned)
            if state.step >= state.steps:
                break
            line = _advance(trainer, wrapped)
            state.elapsed = time.monotonic() - started
            last = state.step == state.steps
            if trainer.dist.main and (last or _due(state.step, config.log_every)):
                _log(trainer, line)
            if _evaluation_due(trainer):
                val_loss = _evaluate(trainer, request, owns_signals)
            if trainer.dist.main:
                try:
                    evaluated = {} if val_loss is None else trainer.objective.evaluation_metadata()
                    watch({**line, "steps": state.steps, "val_loss": val_loss, "seconds": state.seconds,
                           "elapsed": state.elapsed, **evaluated})
                except OSError:  # the terminal is gone, the pipe closed or the disk behind it full: stop as by a signal
                    request.number = request.number or SIGPIPE
            if last or _due(state.step, config.save_every):
                save(trainer)
                saved = state.step
        if trainer.dist.main:
            try:
                with interruptible(request, owns_signals):
                    finish(trainer)
            except Interrupted:
                raise Stopped(trainer.run, state.step, request.number) from None


@contextmanager
def _saving_on_error(trainer: Trainer) -> Iterator[None]:
    """Save the run after an error between two updates, so that no step is lost, and let the error pass.

    With several processes the others cannot take part in the save, so the run continues from its last checkpoint.
    """
    try:
        yield
    except (Stopped, Interrupted):
        raise
    except Exception:
        step = trainer.state.step
        if not trainer.updating and trainer.dist.world == 1 and step > (trainer.record.saved or 0):
            with suppress(Exception):  # a full disk is often the error itself
                save(trainer)
                log.warning("an error stopped the run after step %d, which is saved; continue with `bardlet resume %s`",
                            step, quoted(trainer.run))
        raise


def _advance(trainer: Trainer, wrapped: nn.Module) -> dict[str, Any]:
    """Run the next step, check its numbers and update the average. Return its log line."""
    state, config, started = trainer.state, trainer.config, time.monotonic()
    share = optim.learning_rate(state.step, state.steps, config)
    optim.set_learning_rate(trainer.optimizers, share)
    seed_step(config.seed, state.step, trainer.dist.rank)
    batch = trainer.objective.batch(state.step)
    loss, norm = train_step(wrapped, trainer.optimizers, batch, trainer.objective, config, trainer.dist,
                            trainer.machine["dtype"], trainer.begin_update, state.step)
    _check_numbers(trainer, wrapped, batch, loss, norm)
    state.step += 1
    state.tokens += trainer.objective.count(batch)
    if math.isfinite(loss):
        state.loss_sum += loss
        state.loss_steps += 1
    if config.keep != "last":
        add_to_average(trainer)
    trainer.updating = False
    state.seconds += time.monotonic() - started
    return {"step": state.step, "train_loss": loss, "lr": config.lr * share, "grad_norm": norm,
            "tokens": state.tokens, **trainer.objective.metadata()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def _replan(trainer: Trainer, replan: Callable[[State], int | None], replanned: Callable[[], str]) -> None:
    """Update the number of planned steps from the clock of rank 0, or from the replans of the run being repeated."""
    recorded = dict(trainer.config.replans).get(trainer.state.step)
    steps = recorded or trainer.dist.broadcast_int(replan(trainer.state) or 0)
    before, consequence = trainer.state.steps, ""
    if steps and steps != before:
        trainer.state.steps = max(steps, trainer.state.step + 1)
        consequence = replanned()
    if not recorded and not 0.8 < trainer.state.steps / before < 1.25:
        longer = trainer.state.steps > before
        reason = (", since more would only memorize the text" if trainer.state.steps == trainer.record.most_steps else
                  " to end on time")
        if longer:
            reason += "; the learning rate follows the new plan, so the loss may rise for a while"
        log.warning("steps take %s than planned; training for %d steps instead of %d%s%s",
                    "less time" if longer else "longer", trainer.state.steps, before, reason, consequence)
    if steps and (trainer.state.step, trainer.state.steps) not in trainer.state.replans:
        trainer.state.replans.append((trainer.state.step, trainer.state.steps))
        write_run(trainer)


def _check_numbers(trainer: Trainer, wrapped: nn.Module, batch: Batch, loss: float, norm: float) -> None:
    """Raise, or count a skipped step, if the loss or gradient is not finite; always raise for a weight."""
    step_finite = math.isfinite(loss) and math.isfinite(norm)
    weights_finite = bool(trainer.dist.all_min(int(all_finite(p.detach() for p in trainer.model.parameters()))))
    if step_finite and weights_finite:
        trainer.state.skipped = 0
        return
    trainer.state.skipped += 1
    culprit = "a weight" if not weights_finite else "the loss" if not math.isfinite(loss) else "the gradient"
    problem = (f"{culprit} of step {trainer.state.step + 1} is not a finite number "
               f"({_describe_fault(trainer, wrapped, batch)}{trainer.objective.describe_batch(trainer.state.step)})")
    advice = ("Start a new run with a lower --lr and --muon-lr, or with --dtype fp32 (`bardlet train --config "
              f"{quoted(trainer.run / 'run.toml')} --out NEW --lr ...`)")
    if not weights_finite:
        raise BardletError(f"{problem}; this step was not saved. {advice}. If the hardware was at fault, "
                           f"`bardlet resume {quoted(trainer.run)}` continues from the last checkpoint")
    if trainer.config.on_nan == "stop" or trainer.state.skipped >= 10:
        raise BardletError(f"{problem}; the weights are unchanged. {advice}"
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
            with trainer.dist.last_micro_batch(wrapped, False), autocast(trainer.machine["dtype"], trainer.dist.device):
                loss = trainer.objective.loss(wrapped, micro)
            loss.backward()
            losses.append(loss.detach())
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    finite = all_finite([*losses, *gradients, *(p.detach() for p in trainer.model.parameters())])
    for p in trainer.model.parameters():
        p.grad = None
    ranks = trainer.dist.ranks_where(not finite)
    return f"in process {', '.join(map(str, ranks))} of {trainer.dist.world}, " if ranks else ""


def evaluate(trainer: Trainer) -> float:
    """Return the validation loss of the current weights, the same on every rank."""
    trainer.model.eval()
    try:
        with torch.no_grad(), eager(trainer.model):
            return trainer.objective.evaluate(trainer.model)
    finally:
        trainer.model.train()


def _evaluation_due(trainer: Trainer) -> bool:
    """Return True if an evaluation is due after the current step and has not run yet."""
    done = trainer.state.step
    return done > trainer.state.evaluated and (done == trainer.state.steps or _due(done, trainer.config.eval_every))


def _evaluate(trainer: Trainer, request: StopRequest, may_interrupt: bool) -> float | None:
    """Return the validation loss, log it, and keep the weights if they are the best so far. None after a signal."""
    value = None
    with suppress(Interrupted), interruptible(request, may_interrupt):
        value = evaluate(trainer)
    if trainer.dist.all_max(int(value is None)) or value is None:  # interrupted on any rank
        return None
    step = trainer.state.step
    if trainer.dist.main:
        if trainer.config.keep == "best" and value < trainer.best:
            hf.write_weights(trainer.run, trainer.model.hf_state_dict())
            trainer.record.update(selected_by="best", selected_step=step, val_loss=value, averaged=None)
            write_run(trainer)
            trainer.best = value
        metrics.append_metrics(trainer.run, {"step": step, "val_loss": value,
                                             **trainer.objective.evaluation_metadata()})
    trainer.state.evaluated = step  # last: after an error above, the resumed run evaluates again
    return value


def _log(trainer: Trainer, line: dict[str, Any]) -> None:
    state = trainer.state
    line = {**line, "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else None}
    trainer.record.train_loss = line["train_loss"]
    state.loss_sum, state.loss_steps = 0.0, 0
    metrics.append_metrics(trainer.run, {**line, "seconds": round(state.seconds, 3),
                                        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1)})


def finish(trainer: Trainer) -> None:
    """Write the weights that --keep selects to the root, and record which they are.

    With --keep best, the average over the last fifth of the steps is also a candidate.
    """
    keep, last = trainer.config.keep, trainer.state.step
    chosen = keep == "best" and trainer.best < math.inf
    if keep == "average" or (keep == "best" and trainer.state.averaged > 1):
        with average_weights(trainer):
            value = evaluate(trainer)
            if keep == "average" or value < trainer.best:
                hf.write_weights(trainer.run, trainer.model.hf_state_dict())
                trainer.record.update(selected_by=keep, selected_step=last, val_loss=value,
                                      averaged=trainer.state.averaged)
                chosen = True
    if not chosen:  # --keep last, or no evaluation to choose by
        lines = [line for line in metrics.read_metrics(trainer.run) if "val_loss" in line]
        hf.write_weights(trainer.run, trainer.model.hf_state_dict())
        value = lines[-1]["val_loss"] if lines else evaluate(trainer)  # a damaged metrics.jsonl has none
        trainer.record.update(selected_by="last", selected_step=last, val_loss=value, averaged=None)
    write_run(trainer)


