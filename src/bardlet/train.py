"""The training step and the loop around it. Nothing here knows a model, a tokenizer or a stage.

A stage is *batches + a loss function*: `fit` asks for the global batch of a step, has `train_step` turn it into an
update, and writes what a run folder holds. The batch, the dropout masks and the learning rate of a step are functions
of the settings and the step's number, so going on from a checkpoint is the same as never having stopped.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bardlet import checkpoint, hf, optim
from bardlet.config import TrainConfig
from bardlet.dist import Dist, autocast
from bardlet.errors import BardletError
from bardlet.loss import Batch

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class Stage:
    """What a kind of training consists of."""

    batch: Callable[[int], Batch]
    """The global batch of a step: the same on every process."""
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    """The summed loss of a batch."""
    count: Callable[[Batch], int]
    """How many terms that sum has."""
    evaluate: Callable[[nn.Module], float]
    """The validation loss (nats per term) of a model in eval mode."""


@dataclass
class State:
    """Where a run is. With weights, optimizer and random state it is all that going on needs."""

    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Optimizer steps planned."""
    seconds: float = 0.0
    """Time spent in training steps."""
    elapsed: float = 0.0
    """Time of the whole run, with preparation, compilation, evaluation and saving."""
    prepared: float = 0.0
    """How much of `elapsed` went by before the first step."""
    tokens: int = 0
    """Targets that were learned from."""
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last line of metrics.jsonl."""
    loss_steps: int = 0
    skipped: int = 0
    """Steps skipped in a row because of a number that was none."""
    averaged: int = 0
    """How many steps' weights the average holds."""
    replans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Trainer:
    """The things that a run moves through its steps."""

    run: Path
    model: Any
    """One of bardlet.models, raw: neither compiled as a whole nor wrapped."""
    optimizers: list[torch.optim.Optimizer]
    stage: Stage
    config: TrainConfig
    dist: Dist
    machine: dict[str, Any]
    record: dict[str, Any]
    """What run.toml says happened; `selected_by` and `val_loss` among it."""
    state: State = field(default_factory=State)
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """Mean of the weights, by parameter name; empty before the last fifth of the steps, and with --keep last."""
    best: float = math.inf


class Stopped(BardletError):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, run: Path, step: int, number: int):
        super().__init__(f"stopped after step {step}, and saved; go on with `bardlet resume {run}`")
        self.exit_code = 128 + number


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, stage: Stage,
               config: TrainConfig, dist: Dist, dtype: str) -> tuple[float, float]:
    """One update from one global batch.

    Args:
        model: as `Dist.wrap` returned it.
        batch: the global batch; micro-batches and processes take slices of its rows.
        dtype: fp32 or bf16, the precision of the matrix products.

    Returns:
        (loss, norm): the mean loss in nats over all unmasked targets of the global batch, and the norm of its
        gradient before clipping. When one of them is not finite the weights have not been touched.
    """
    targets = stage.count(batch)
    micro_rows = len(next(iter(batch.values()))) // config.grad_accum
    total = torch.zeros((), device=dist.device)
    for i in range(config.grad_accum):
        rows = slice(i * micro_rows, (i + 1) * micro_rows)
        micro = {name: dist.put(t[rows][dist.rows(micro_rows)]) for name, t in batch.items()}
        with dist.last_micro_batch(model, i == config.grad_accum - 1):
            with autocast(dtype, dist.device):
                loss_sum = stage.loss(model, micro)
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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Give PyTorch's generators the state that belongs to this step: dropout is a function of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def fit(t: Trainer, replan: Callable[[State], int | None] = lambda state: None,
        watch: Callable[[dict[str, Any]], None] = lambda line: None, asked: list[int] | None = None) -> None:
    """Train until the planned number of steps is done, evaluating, logging and saving on the way.

    Args:
        t: what is trained, at the step where it is; it is moved on in place.
        replan: asked before each step; a number is the new count of planned steps, and is recorded.
        watch: called after each step with what a person wants to see.
        asked: the box of a `signals` that is around this call already; None: `fit` has one of its own.

    Raises:
        Stopped: after a signal; the run has been saved. One that came in the last step stops nothing, since all is
            done: whoever has more to do looks into the box.
        BardletError: a loss or gradient is not finite (the last checkpoint stays as it was).
    """
    wrapped = t.dist.wrap(t.model)
    state, config = t.state, t.config
    started = time.monotonic() - state.elapsed
    val_loss = None
    t.model.train()
    with signals() if asked is None else nullcontext(asked) as box:
        while True:
            _replan(t, replan)
            if state.step >= state.steps:
                break
            begun = time.monotonic()
            share = optim.learning_rate(state.step, state.steps, config)
            optim.set_learning_rate(t.optimizers, share)
            seed_step(config.seed, state.step, t.dist.rank)
            batch = t.stage.batch(state.step)
            loss, norm = train_step(wrapped, t.optimizers, batch, t.stage, config, t.dist, t.machine["dtype"])
            _check_numbers(t, loss, norm)
            state.step += 1
            state.tokens += t.stage.count(batch)
            if math.isfinite(loss):
                state.loss_sum += loss
                state.loss_steps += 1
            if config.keep != "last":
                _add_to_average(t)
            state.seconds += time.monotonic() - begun
            state.elapsed = time.monotonic() - started

            stop = t.dist.from_main(box[0])
            last = state.step == state.steps
            line = {"step": state.step, "train_loss": loss, "lr": config.lr * share, "grad_norm": norm,
                    "tokens": state.tokens}
            if last or _due(state.step, config.eval_every):
                val_loss = _evaluate(t, state.step)
            if t.dist.main:
                watch({**line, "steps": state.steps, "val_loss": val_loss, "seconds": state.seconds,
                       "elapsed": state.elapsed})
                if last or _due(state.step, config.log_every):
                    _log(t, line)
            if last or stop or _due(state.step, config.save_every):
                save(t)
            if stop and not last:
                raise Stopped(t.run, state.step, stop)
    if t.dist.main:
        finish(t)


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def _replan(t: Trainer, replan: Callable[[State], int | None]) -> None:
    """Take a new number of planned steps from the clock of rank 0, or from the record of the run that is repeated."""
    recorded = dict(t.config.replans).get(t.state.step)
    steps = recorded or t.dist.from_main(replan(t.state) or 0)
    if steps and steps != t.state.steps:
        t.state.steps = max(steps, t.state.step + 1)
    if steps and (t.state.step, t.state.steps) not in t.state.replans:
        t.state.replans.append((t.state.step, t.state.steps))
        write_run(t)


def _check_numbers(t: Trainer, loss: float, norm: float) -> None:
    """Stop, or count a skipped step, when the loss or the gradient of this step is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        t.state.skipped = 0
        return
    t.state.skipped += 1
    what = "the loss" if not math.isfinite(loss) else "the gradient"
    where = f"{what} of step {t.state.step + 1} is not a finite number"
    if t.config.on_nan == "stop" or t.state.skipped >= 10:
        raise BardletError(f"{where}; the weights were not touched. Lower --lr and --muon-lr, or take --dtype fp32"
                           + ("" if t.config.on_nan == "skip" else "; --on-nan skip leaves out such steps"))
    log.warning("%s; the step is skipped (%d in a row)", where, t.state.skipped)


def _add_to_average(t: Trainer) -> None:
    """The mean of the weights after each of the last fifth of the steps: a fixed rule, chosen by nothing."""
    if t.state.step <= 0.8 * t.state.steps:
        t.average.clear()  # a plan that has grown may have begun too early
        t.state.averaged = 0
        return
    t.state.averaged += 1
    for name, p in t.model.named_parameters():
        if name in t.average:
            t.average[name].lerp_(p.detach(), 1 / t.state.averaged)
        else:
            t.average[name] = p.detach().clone()


@contextmanager
def averaged(t: Trainer) -> Iterator[None]:
    """Inside, the model has the averaged weights, if there are any."""
    own = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    _put(t.model, t.average)
    try:
        yield
    finally:
        _put(t.model, own)


@torch.no_grad()
def _put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in weights:
            p.copy_(weights[name])


def evaluate(t: Trainer) -> float:
    """The validation loss by the weights as they are; the same number in each process."""
    t.model.eval()
    # other shapes and no gradients: compiling for them would cost more than it gains
    eager = torch.compiler.set_stance("force_eager") if t.machine["compiled"] else nullcontext()
    with torch.no_grad(), eager:
        value = t.stage.evaluate(t.model)
    t.model.train()
    return value


def _evaluate(t: Trainer, step: int) -> float:
    """Evaluate after `step`, log it, and keep the weights at the root when they are the best so far."""
    value = evaluate(t)
    if t.dist.main:
        checkpoint.append_metrics(t.run, {"step": step, "val_loss": value})
        if t.config.keep == "best" and value < t.best:
            t.best = value
            hf.write_weights(t.run, t.model.hf_state_dict())
            t.record.pop("averaged", None)
            t.record.update(selected_by="best", selected_step=step, val_loss=value)
            write_run(t)
    return value


def _log(t: Trainer, line: dict[str, Any]) -> None:
    state = t.state
    line = {**line, "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else None}
    t.record["train_loss"] = line["train_loss"]
    state.loss_sum, state.loss_steps = 0.0, 0
    checkpoint.append_metrics(t.run, {**line, "seconds": round(state.seconds, 3),
                                      "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1)})


def save(t: Trainer) -> None:
    """A checkpoint of this step, written by rank 0."""
    if not t.dist.main:
        return
    weights = t.model.hf_state_dict()
    if t.config.keep != "best" or not (t.run / "model.safetensors").exists():
        # a run that is stopped here is a model, too: until --keep has something to choose from, the newest weights
        hf.write_weights(t.run, weights)
        t.record.update(selected_by="last", selected_step=t.state.step)
    state = {f"optimizer/{name}": v for name, v in optim.state_tensors(t.optimizers, t.model).items()}
    state |= {f"average/{name}": v for name, v in t.average.items()}
    state["rng"] = torch.get_rng_state()
    facts = {**asdict(t.state), "machine": t.machine}
    checkpoint.save(t.run, t.state.step, weights, state, facts, t.config.keep_checkpoints)
    write_run(t)


def restore(t: Trainer, folder: Path) -> None:
    """Put `t` where it was when the checkpoint `folder` was saved, and cut metrics.jsonl there."""
    weights, tensors, facts = checkpoint.load(folder)
    t.model.load_hf_state_dict(weights)
    rest = {"optimizer": {}, "average": {}}  # type: dict[str, dict[str, torch.Tensor]]
    for name, value in tensors.items():
        kind, _, key = name.partition("/")
        if kind in rest:
            rest[kind][key] = value
    optim.load_state_tensors(t.optimizers, t.model, rest["optimizer"], str(folder / "trainer.safetensors"))
    t.average = {name: v.to(t.dist.device) for name, v in rest["average"].items()}
    torch.set_rng_state(tensors["rng"])
    known = {name: facts[name] for name in asdict(t.state)}
    t.state = State(**{**known, "replans": [(a, b) for a, b in facts["replans"]]})
    if t.dist.main:
        values = [line["val_loss"] for line in checkpoint.cut_metrics(t.run, t.state.step) if "val_loss" in line]
        if t.record.get("selected_by") == "best" and t.record["selected_step"] <= t.state.step:
            values.append(t.record["val_loss"])  # a lost line of metrics.jsonl does not make worse weights the best
        t.best = min((v for v in values if math.isfinite(v)), default=math.inf)


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
        lines = [line for line in checkpoint.read_metrics(t.run) if "val_loss" in line]
        hf.write_weights(t.run, t.model.hf_state_dict())
        t.record.pop("averaged", None)
        t.record.update(selected_by="last", selected_step=last, val_loss=lines[-1]["val_loss"])
    write_run(t)


def write_run(t: Trainer) -> dict[str, Any]:
    """run.toml: the settings as resolved and the record of what happened so far, which is returned."""
    config = replace(t.config, steps=t.state.replans[0][1] if t.state.replans else t.state.steps, minutes=None,
                     replans=tuple(t.state.replans))
    record = {**t.record, "steps": t.state.step, "seconds": round(t.state.seconds, 3),
              "tokens_per_second": round(t.state.tokens / max(t.state.seconds, 1e-9), 1), "machine": t.machine}
    if t.dist.main:
        checkpoint.write_run(t.run, config, record)
    return record


@contextmanager
def signals() -> Iterator[list[int]]:
    """A box that holds the number of the first signal (Ctrl-C or SIGTERM), 0 before; a second one acts at once."""
    box = [0]

    def note(number: int, frame: object) -> None:
        if box[0]:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        box[0] = number
        log.warning("finishing what is under way and saving; once more to leave at once")

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield box
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
