"""The training step and the loop around it. Nothing here knows a model, a tokenizer or a stage.

A stage is *batches + a loss function*: `fit` asks for the global batch of a step, has `train_step` turn it into an
update, and writes what a run folder holds. The batch, the dropout masks and the learning rate of a step are functions
of the settings and the step's number, so going on from a checkpoint is the same as never having stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from bardlet import checkpoint, hf, optim
from bardlet.config import TrainConfig
from bardlet.dist import Dist, autocast, eager
from bardlet.errors import BardletError
from bardlet.loss import Batch
from bardlet.signals import Asked, BrokenOff, Stopped, breakable, signals

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
    place: Callable[[int], str] = lambda step: f"batch {step + 1}"
    """Where the batch of a step lies in the data, in words."""
    widest: Callable[[], Batch] | None = None
    """A batch that takes as much memory as any; None: they all take the same."""
    facts: Callable[[], dict[str, float]] = dict
    """What else there is to log of the batch that was made last."""
    memory: Memory | None = None
    """What the batches depend on besides the step, where they do."""
    period: int = 1
    """Steps after which the time that a step takes comes again."""


class Memory(Protocol):
    """What the batches of a run depend on besides settings and step: a checkpoint keeps it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, by name."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave; from nothing, begin."""


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
    evaluated: int = 0
    """The step after which the last evaluation was."""
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
    total = torch.zeros((), device=dist.device)
    for i, micro in enumerate(micro_batches(batch, config.grad_accum, dist)):
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
    if state.step == 0 and t.stage.memory:
        t.stage.memory.load({})  # steps may have been timed before
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
            begun = time.monotonic()
            share = optim.learning_rate(state.step, state.steps, config)
            optim.set_learning_rate(t.optimizers, share)
            seed_step(config.seed, state.step, t.dist.rank)
            batch = t.stage.batch(state.step)
            loss, norm = train_step(wrapped, t.optimizers, batch, t.stage, config, t.dist, t.machine["dtype"])
            _check_numbers(t, wrapped, batch, loss, norm)
            state.step += 1
            state.tokens += t.stage.count(batch)
            if math.isfinite(loss):
                state.loss_sum += loss
                state.loss_steps += 1
            if config.keep != "last":
                _add_to_average(t)
            state.seconds += time.monotonic() - begun
            state.elapsed = time.monotonic() - started

            last = state.step == state.steps
            line = {"step": state.step, "train_loss": loss, "lr": config.lr * share, "grad_norm": norm,
                    "tokens": state.tokens, **t.stage.facts()}
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
             f"{t.stage.place(t.state.step)})")
    lower = (f"Take a lower --lr and --muon-lr, or --dtype fp32, in a new run (`bardlet train --config "
             f"{t.run / 'run.toml'} --out NEW --lr ...`)")
    if not whole:
        raise BardletError(f"{where}; nothing of it was saved. {lower}; `bardlet resume {t.run}` goes on from the last "
                           "checkpoint, if it was the machine's fault")
    if t.config.on_nan == "stop" or t.state.skipped >= 10:
        raise BardletError(f"{where}; the weights were not touched. {lower}"
                           + ("" if t.config.on_nan == "skip" else "; --on-nan skip leaves out such steps"))
    log.warning("%s; the step is skipped (%d in a row)", where, t.state.skipped)


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers of all tensors are finite: their norm is, then."""
    floats = [x for x in tensors if x.is_floating_point()]
    return bool(nn.utils.get_total_norm(floats).isfinite()) if floats else True


def _at_fault(t: Trainer, wrapped: nn.Module, batch: Batch) -> str:
    """Which of several processes has numbers that are not finite: each computes its share again, alone."""
    if t.dist.world == 1:
        return ""
    seed_step(t.config.seed, t.state.step, t.dist.rank)
    losses: list[torch.Tensor] = []
    for micro in micro_batches(batch, t.config.grad_accum, t.dist):
        with t.dist.last_micro_batch(wrapped, False), autocast(t.machine["dtype"], t.dist.device):
            loss = t.stage.loss(wrapped, micro)
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad for p in t.model.parameters() if p.grad is not None]
    sound = _finite([*losses, *gradients, *(p.detach() for p in t.model.parameters())])
    for p in t.model.parameters():
        p.grad = None
    ranks = t.dist.which(not sound)
    return f"in process {', '.join(map(str, ranks))} of {t.dist.world}, " if ranks else ""


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
        elif p.requires_grad:
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
    try:
        with torch.no_grad(), eager(t.model):
            return t.stage.evaluate(t.model)
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
    state = {f"optimizer/{name}": v for name, v in optim.state_tensors(t.optimizers, t.model).items()}
    state |= {f"average/{name}": v for name, v in t.average.items()}
    state |= {f"beside/{name}": v for name, v in _beside(t.model).items()}
    state |= {f"stage/{name}": v for name, v in (t.stage.memory.tensors() if t.stage.memory else {}).items()}
    state["rng"] = torch.get_rng_state()
    if not _finite([*weights.values(), *state.values()]):
        raise BardletError(f"a number of the optimizer after step {t.state.step} is not finite; nothing was saved. "
                           f"`bardlet resume {t.run}` goes on from the last checkpoint")
    if t.config.keep != "best" or math.isinf(t.best) or not (t.run / "model.safetensors").exists():
        # a run that is stopped here is a model, too: until --keep has something to choose from, the newest weights
        hf.write_weights(t.run, weights)
        t.record.update(selected_by="last", selected_step=t.state.step)
    facts = {**asdict(t.state), "machine": t.machine, "config": asdict(resolved(t)), "record": t.record}
    checkpoint.save(t.run, t.state.step, weights, state, facts, t.config.keep_checkpoints)
    t.record["saved"] = t.state.step
    write_run(t)


def _beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that the files of the model which the run makes do not have: a value model's, the factors of LoRA."""
    return {f"{name}/{key}": x for name, part in _with_beside(model) for key, x in part.beside().items()}


def _with_beside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of the parts of a model that have such weights."""
    return ((name, part) for name, part in model.named_modules() if hasattr(part, "beside"))


def restore(t: Trainer, folder: Path, best_is_lost: bool = False) -> None:
    """Put `t` where it was when the checkpoint `folder` was saved, and cut metrics.jsonl there.

    best_is_lost: the weights at the root are gone: the next that are evaluated are the best.
    """
    (weights, tensors), facts = checkpoint.load(folder), checkpoint.read_facts(folder)
    t.model.load_hf_state_dict(weights)
    rest: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "average": {}, "beside": {}, "stage": {}}
    for name, value in tensors.items():
        kind, _, key = name.partition("/")
        if kind in rest:
            rest[kind][key] = value
    optim.load_state_tensors(t.optimizers, t.model, rest["optimizer"], str(folder / "trainer.safetensors"))
    shapes = {name: p.shape for name, p in t.model.named_parameters()}
    odd = [name for name, v in rest["average"].items() if shapes.get(name) != v.shape]
    if odd or tensors.get("rng", torch.empty(0)).shape != torch.get_rng_state().shape:
        raise BardletError(f"{folder / 'trainer.safetensors'}: damaged: {(odd or ['rng'])[0]} is missing or has "
                           "another shape; take another checkpoint")
    if {name: x.shape for name, x in _beside(t.model).items()} != {name: x.shape for name, x in rest["beside"].items()}:
        raise BardletError(f"{folder / 'trainer.safetensors'}: damaged: it does not have the weights that are learned "
                           "beside the model's own; take another checkpoint")
    for name, part in _with_beside(t.model):
        part.load_beside({key: rest["beside"][f"{name}/{key}"] for key in part.beside()})
    if t.stage.memory:
        t.stage.memory.load(rest["stage"])
    t.average = {name: v.to(t.dist.device) for name, v in rest["average"].items()}
    torch.set_rng_state(tensors["rng"].byte())
    known = {name: facts[name] for name in asdict(t.state) if name in facts}
    t.state = State(**{**known, "replans": [(a, b) for a, b in facts["replans"]]})
    if t.dist.main:
        lines = checkpoint.cut_metrics(t.run, t.state.step, t.state.evaluated)
        values = [line["val_loss"] for line in lines if "val_loss" in line]
        if t.record.get("selected_by") == "best" and t.record["selected_step"] <= t.state.step:
            values.append(t.record["val_loss"])  # a lost line of metrics.jsonl does not make worse weights the best
        t.best = math.inf if best_is_lost else min((v for v in values if math.isfinite(v)), default=math.inf)


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
        value = lines[-1]["val_loss"] if lines else evaluate(t)  # none where metrics.jsonl is damaged
        t.record.update(selected_by="last", selected_step=last, val_loss=value)
    write_run(t)


def write_run(t: Trainer) -> dict[str, Any]:
    """run.toml: the settings as resolved and the record of what happened so far, which is returned."""
    record = {**t.record, "steps": t.state.step, "seconds": round(t.state.seconds, 3),
              "tokens_per_second": round(t.state.tokens / max(t.state.seconds, 1e-9), 1), "machine": t.machine}
    if t.dist.main:
        checkpoint.write_run(t.run, resolved(t), record)
    return record


def resolved(t: Trainer) -> TrainConfig:
    """The settings with which this run can be repeated without a clock."""
    first = t.state.replans[0][1] if t.state.replans else t.state.steps
    return replace(t.config, steps=first, minutes=None, replans=tuple(t.state.replans))
