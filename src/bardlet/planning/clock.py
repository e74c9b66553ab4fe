"""Turn minutes into steps. The clock decides how many steps to plan, never what a step computes.

The plan comes from a few timed steps before the first one, and is revised at a few points of the run. run.toml records
each decision as (step, steps planned), so the run can be repeated without a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from bardlet.runtime import contention, parallelize
from bardlet.runtime.distributed import Dist
from bardlet.training import loss_scale, optim
from bardlet.training.state import State, Trainer
from bardlet.training.step import InRun, seed_step, train_step

RESERVE, MAX_RESERVE = 0.02, 0.1
"""Share of the time reserved for the last evaluation, the last checkpoint and the sample, and the maximum share."""

FINISHING = 0.3
"""Seconds of these, on a quiet machine, that are reserved for each time that other programs slow it down. They take 1.5
with the picture of the loss: on a very busy machine a run ends a few seconds late rather than train less."""

TIMING = 0.03
"""Maximum share of the time for timing steps, besides a first one, before training."""

HALVE_BATCH_BELOW, MIN_TOKENS = 100, 512
"""If the time is too short for this many steps, bardlet halves a batch that it chose, down to this many tokens."""

ONE_EVALUATION = 0.02
"""Maximum share of the time for one evaluation; the last one comes on top of the share of all others."""

EVALUATION_SHARE = 0.05
"""Share of the time for evaluations."""

EVALUATIONS = 20
"""Evaluations per run, unless they take too long."""

RATE_CHECKS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the planned steps at which the pace is checked: a machine may slow down in its second half hour. A new plan
changes the learning-rate decay by as much as the old one was off."""


def seconds_per_step(trainer: Trainer, count: int = 4, patience: float = 5.0) -> float:
    """Return the seconds per training step, timed over `count` steps after a warm-up step (which also compiles).

    No further step starts once the timed ones have taken `patience` seconds, or the warm-up step alone, if it compiled
    and loaded nothing. The steps are real ones on the run's own batches, with temporary optimizers; the weights are
    restored.
    """
    warm = trainer.dist.device.type == "cpu" and not trainer.machine.get("compiled")
    patience_first = patience if warm else math.inf
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    optimizers = optim.build(trainer.model, trainer.config, trainer.dist)
    wrapped = parallelize.wrap(trainer.model, trainer.dist)
    trainer.model.train()
    times: list[float] = []
    for step in range(count + 1):
        # all ranks must run the same number of steps: use rank 0's times
        late = times[0] > patience_first if len(times) == 1 else sum(times[1:]) > patience
        if trainer.dist.broadcast_int(int(late)):
            break
        seed_step(trainer.config.seed, step, trainer.dist.rank)
        started = time.monotonic()
        train_step(wrapped, optimizers, trainer.objective.batch(step), trainer.objective, trainer.config,
                   trainer.dist, trainer.machine["dtype"], InRun(step=step, loss_scale=loss_scale.factor(trainer)))
        times.append(time.monotonic() - started)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if name in weights:
                p.copy_(weights[name])
    timed = times[1 : trainer.objective.period] or times[1:] or times
    seconds = sorted(timed)[len(timed) // 2]
    if trainer.objective.period == 1:
        return seconds
    # spread the extra time of a period's first step (its rollout) over the period
    return seconds + max(0.0, times[0] - seconds) / trainer.objective.period


def evaluations_for(seconds: float, per_evaluation: float, share: float = EVALUATION_SHARE) -> int:
    """Return the number of evaluations in a run of `seconds`: as many as fit in `share` of it, 1 to EVALUATIONS."""
    return max(1, min(EVALUATIONS, int(share * seconds / per_evaluation)))


def steps_per_evaluation(trainer: Trainer) -> int:
    """Return the steps between evaluations: about 20 evaluations, fewer if they would take longer than the training.

    Evaluating a token takes about a third of training on it.
    """
    train_tokens, val_tokens = trainer.state.steps * trainer.config.tokens_per_step, trainer.record.val_tokens
    number = evaluations_for(3 * train_tokens, val_tokens, share=1) if val_tokens else EVALUATIONS
    return -(-trainer.state.steps // number)


def reserve(seconds: float, slowdown: float = 1.0) -> float:
    """Return the seconds to keep for the end of a run of `seconds`, on a machine that is `slowdown` times slower."""
    return min(RESERVE * seconds + FINISHING * (slowdown - 1), MAX_RESERVE * seconds)


def usable(seconds: float, slowdown: float = 1.0) -> float:
    """Return approximately how many of `seconds` are left for training steps."""
    return seconds * (1 - EVALUATION_SHARE) - reserve(seconds, slowdown)


def steps_for(seconds: float, per_step: float, evaluating: float, slowdown: float = 1.0) -> int:
    """Return the number of steps that fit in `seconds`, less `evaluating` seconds of evaluation; at least 1."""
    return max(1, int((seconds - reserve(seconds, slowdown) - evaluating) / per_step))


def replanner(seconds: float, max_steps: int | None = None,
              slowdown: Callable[[], float] = lambda: 1.0) -> Callable[[State], int | None]:
    """Return a `replan` for `fit`, which adjusts the number of steps at RATE_CHECKS to end the run on time.

    The pace is that of the steps since the last check (after a resume: of all steps), plus the average time per step
    that went to evaluations and checkpoints.

    Args:
        seconds: time for the whole run, including `State.elapsed`.
        max_steps: upper limit of the plan; None: no limit.
        slowdown: how many times slower other programs make this machine now.
    """
    last_check: tuple[int, float] | None = None

    def replan(state: State) -> int | None:
        nonlocal last_check
        checks = len(state.replans) - 1  # the first entry is the initial plan
        if checks >= len(RATE_CHECKS) or not max(1, RATE_CHECKS[checks] * state.steps) <= state.step < state.steps:
            return None
        step, trained = last_check or (0, 0.0)
        overhead = max(0.0, state.elapsed - state.prepared - state.seconds)
        per_step = (state.seconds - trained) / (state.step - step) + overhead / state.step
        last_check = state.step, state.seconds
        left = seconds - reserve(seconds, slowdown()) - state.elapsed
        steps = state.step + max(1, int(left / per_step))
        return max(state.step + 1, min(steps, max_steps or steps))

    return replan


def slowdown(dist: Dist) -> float:
    """Return `contention.slowdown` of rank 0."""
    return dist.broadcast_int(int(1000 * contention.slowdown())) / 1000


def seconds_left(until: float, dist: Dist) -> float:
    """Return the seconds from now to `until` (`time.monotonic`), by the clock of rank 0; at least 1."""
    return max(1.0, dist.broadcast_int(int(1000 * (until - time.monotonic()))) / 1000)
