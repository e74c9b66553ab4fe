"""The training loop, independent of model, tokenizer and stage.

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
from functools import partial
from typing import Any

import torch
from torch import nn

from bardlet.errors import quoted
from bardlet.run import metrics
from bardlet.runtime import parallelize
from bardlet.runtime.compiler import eager
from bardlet.runtime.signals import Interrupted, Stopped, StopRequest, interruptible, signals
from bardlet.runtime.turns import shared_by
from bardlet.training import checks, loss_scale, optim
from bardlet.training.averaging import add_to_average, average_weights
from bardlet.training.checkpointing import note_saved, save, write_result, write_run
from bardlet.training.state import State, Trainer
from bardlet.training.step import InRun, launch_step, seed_step, train_step
from bardlet.training.together import Together

log = logging.getLogger("bardlet")

UPDATE_SECONDS = 5.0
"""Seconds after which a change counts as waiting for a lost process."""
SIGPIPE = 13
"""The number of the signal of a closed pipe, which Windows lacks."""


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
    owns_signals, wrapped = stop_request is None, parallelize.wrap(trainer.model, trainer.dist)
    state, config = trainer.state, trainer.config
    started = time.monotonic() - state.elapsed
    trainer.model.train()
    if trainer.dist.main and trainer.dist.heart and not parallelize.is_sharded(trainer.model):
        trainer.dist.heart.rescue = partial(_rescue, trainer)
    if state.step == 0 and trainer.objective.stage_state:
        trainer.objective.stage_state.load({})  # timing steps may have changed it
    with signals() if stop_request is None else nullcontext(stop_request) as request, _saving_on_error(trainer):
        saved, together = state.step, Together(trainer.dist)
        # a resumed run starts with the evaluation in which it was stopped
        val_loss = _evaluate(trainer, request, owns_signals, together) if _evaluation_due(trainer) else None
        while True:
            stop = together.stop(request)
            if stop and state.step and (owns_signals or state.step < state.steps):
                checks.read(trainer, together)
                _save_at_stop(trainer, saved)
                raise Stopped(trainer.run, state.step, stop)
            state.elapsed = time.monotonic() - started
            _replan(trainer, together.steps(lambda: replan(state)), replanned)
            if state.step >= state.steps:
                break
            trainer.settled = True
            line = _advance(trainer, wrapped, together, request)
            state.elapsed = time.monotonic() - started
            last = state.step == state.steps
            if trainer.dist.main and (last or _due(state.step, config.log_every)):
                _log(trainer, line)
            trainer.settled = True
            if _evaluation_due(trainer):
                val_loss = _evaluate(trainer, request, owns_signals, together)
            trainer.unsettle()
            with parallelize.whole(trainer.model) if _samples_due(trainer) else nullcontext():
                if trainer.dist.main:
                    _report(trainer, line, val_loss, watch, request)
            if last or _due(state.step, config.save_every):
                checks.check_weights(trainer)
                save(trainer)
                saved = state.step
            if trainer.saver:
                note_saved(trainer, trainer.saver.saved())
        _end(trainer, request, owns_signals)


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


def _rescue(trainer: Trainer) -> None:
    """Save the last complete step after another process was lost, from any thread.

    Rank 0 of copies has all of it. Of a sharded model, the rows of the lost process are lost, too: such a run continues
    from its last checkpoint.
    """
    with trainer.lock:
        trainer.ending = True
    until = time.monotonic() + UPDATE_SECONDS
    while not trainer.settled and time.monotonic() < until:
        time.sleep(0.05)
    if trainer.settled and trainer.state.step > (trainer.record.saved or 0):
        save(trainer)
        log.warning("saved step %d before leaving", trainer.state.step)


def _advance(trainer: Trainer, wrapped: nn.Module, together: Together, request: StopRequest) -> dict[str, Any]:
    """Run the next step, check its numbers and update the average. Return its log line."""
    state, config, started = trainer.state, trainer.config, time.monotonic()
    share = optim.learning_rate(state.step, state.steps, config)
    optim.set_learning_rate(trainer.optimizers, share)
    seed_step(config.seed, state.step, trainer.dist.rank)
    batch = trainer.objective.batch(state.step)
    in_run = InRun(trainer.begin_update, state.step, partial(together.add_up, request=request),
                   loss_scale.factor(trainer))
    arguments = (wrapped, trainer.optimizers, batch, trainer.objective, config, trainer.dist, trainer.machine["dtype"],
                 in_run)
    if checks.looks_at(trainer, state.step):
        checks.read(trainer, together)
        trainer.last = loss, norm = train_step(*arguments)
        together.read()
        together.report_weights(checks.weights_are_finite(trainer))
        if not loss_scale.adapted(trainer, loss, norm):
            checks.check_numbers(trainer, wrapped, batch, (loss, norm), together.faulty)
        trainer.count_loss(loss)
    else:
        trainer.unread.append(launch_step(*arguments, look=False))
    state.step += 1
    state.tokens += trainer.objective.count(batch)
    if config.keep != "last":
        add_to_average(trainer)
    trainer.updating = False
    state.seconds += time.monotonic() - started
    return {"step": state.step, "train_loss": trainer.last[0], "lr": config.lr * share, "grad_norm": trainer.last[1],
            "tokens": state.tokens, **trainer.objective.metadata()}


def _save_at_stop(trainer: Trainer, saved: int) -> None:
    """Save the run before all processes leave. saved: the step of its last checkpoint."""
    if saved != trainer.state.step:
        save(trainer)
    _complete_save(trainer)
    trainer.dist.broadcast_int(0)  # no rank leaves before rank 0 has saved


def _end(trainer: Trainer, request: StopRequest, may_interrupt: bool) -> None:
    """Write the result after the last step."""
    _complete_save(trainer)
    if trainer.dist.heart:
        trainer.dist.heart.rescue = None
    sharded = parallelize.is_sharded(trainer.model)  # then all ranks must evaluate to the end
    if trainer.dist.main or sharded:
        try:
            with interruptible(request, may_interrupt and not sharded):
                finish(trainer)
        except Interrupted:
            raise Stopped(trainer.run, trainer.state.step, request.number) from None


def _complete_save(trainer: Trainer) -> None:
    """Wait for a checkpoint that is still being written."""
    if trainer.saver:
        note_saved(trainer, trainer.saver.wait())


def _report(trainer: Trainer, line: dict[str, Any], val_loss: float | None, watch: Callable[[dict[str, Any]], None],
            request: StopRequest) -> None:
    """Give a step's values to `watch`, which may sample from the model."""
    state = trainer.state
    try:
        evaluated = {} if val_loss is None else trainer.objective.evaluation_metadata()
        watch({**line, "steps": state.steps, "val_loss": val_loss, "seconds": state.seconds, "elapsed": state.elapsed,
               **evaluated})
    except OSError:  # the terminal is gone, the pipe closed or the disk behind it full: stop as by a signal
        request.number = request.number or SIGPIPE


def _samples_due(trainer: Trainer) -> bool:
    """Return True if the run samples from the current weights, which it does after an evaluation."""
    return trainer.config.samples and trainer.state.evaluated == trainer.state.step


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def _replan(trainer: Trainer, steps: int, replanned: Callable[[], str]) -> None:
    """Update the number of planned steps to the clock's (0: no change), or as in the run that is repeated."""
    recorded = dict(trainer.config.replans).get(trainer.state.step)
    steps = recorded or steps
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


def evaluate(trainer: Trainer) -> float:
    """Return the validation loss of the current weights."""
    trainer.model.eval()
    # on a GPU, compiled code gains more than it costs to compile it for the shapes of an evaluation
    as_compiled = nullcontext() if trainer.dist.device.type == "cuda" else eager(trainer.model)
    try:
        with torch.no_grad(), as_compiled:
            return trainer.objective.evaluate(trainer.model)
    finally:
        trainer.model.train()


def _evaluation_due(trainer: Trainer) -> bool:
    """Return True if an evaluation is due after the current step and has not run yet."""
    done = trainer.state.step
    return done > trainer.state.evaluated and (done == trainer.state.steps or _due(done, trainer.config.eval_every))


def _evaluate(trainer: Trainer, request: StopRequest, may_interrupt: bool, together: Together) -> float | None:
    """Return the validation loss, log it, and keep the weights if they are the best so far. None after a signal."""
    sharded = parallelize.is_sharded(trainer.model)  # then all ranks must evaluate to the end
    allowed = may_interrupt and not sharded
    try:
        with (shared_by(trainer.dist, lambda: request.number if allowed else 0),
              interruptible(request, allowed and trainer.dist.world == 1)):
            value = evaluate(trainer)
    except Interrupted as interruption:
        together.heard(*interruption.args)
        return None
    trainer.unsettle()
    step = trainer.state.step
    better = trainer.config.keep == "best" and value < trainer.best
    if sharded:
        better = bool(trainer.dist.broadcast_int(int(better)))  # rank 0 knows the best so far
    if better:
        write_result(trainer)
        trainer.record.update(selected_by="best", selected_step=step, val_loss=value, averaged=None)
        write_run(trainer)
        trainer.best = value
    if trainer.dist.main:
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
    """Write the weights that --keep selects to the root, and record which they are: on rank 0, or all if sharded.

    With --keep best, the average over the last fifth of the steps is also a candidate.
    """
    keep, last = trainer.config.keep, trainer.state.step
    sharded = parallelize.is_sharded(trainer.model)

    def agreed(decision: bool) -> bool:
        return bool(trainer.dist.broadcast_int(int(decision))) if sharded else decision

    chosen = agreed(keep == "best" and trainer.best < math.inf)
    if keep == "average" or (keep == "best" and trainer.state.averaged > 1):
        with average_weights(trainer):
            value = evaluate(trainer)
            if agreed(keep == "average" or value < trainer.best):
                write_result(trainer)
                trainer.record.update(selected_by=keep, selected_step=last, val_loss=value,
                                      averaged=trainer.state.averaged)
                chosen = True
    if not chosen:  # --keep last, or no evaluation to choose by
        write_result(trainer)
        lines = [line for line in metrics.read_metrics(trainer.run) if "val_loss" in line]
        known = agreed(bool(lines))  # a damaged metrics.jsonl has no losses
        value = lines[-1]["val_loss"] if lines else trainer.best if known else evaluate(trainer)
        trainer.record.update(selected_by="last", selected_step=last, val_loss=value, averaged=None)
    write_run(trainer)


