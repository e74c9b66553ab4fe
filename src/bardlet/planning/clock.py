"""Minutes into steps. The clock decides how many steps are planned, never what a step does.

A plan is made before the first step from a few timed ones, and made again at a few points on the way. Each decision is
an event (step, steps planned) of run.toml, so the run can be repeated without a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bardlet.runtime.distributed import Dist
from bardlet.training import optim
from bardlet.training.state import State, Trainer
from bardlet.training.trainer import seed_step, train_step

RESERVE = 0.03
"""Share of the time kept for the last evaluation, the last checkpoint and the sample."""

EVALUATION_SHARE = 0.05
"""Share of the time for the evaluations on the way; there is at least one, which takes no more (`planning/plan.py`)."""

EVALUATIONS = 20
"""Evaluations of a run, where they do not take too long."""

RATE_CHECKS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the planned steps the clock is looked at again: a machine may be slower in its second half hour than in its
first. A new plan bends the decay by as much as the old one was wrong."""


def seconds_per_step(trainer: Trainer, count: int = 4, patience: float = 5.0) -> float:
    """The time of a training step, from `count` of them after one that warms up (and compiles). Nothing is kept.

    Where steps are long, fewer are made: none begins once `patience` seconds went to the timed ones.

    The steps are real ones, on the run's own batches with an optimizer made for it; the weights are put back.
    """
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    optimizers = optim.build(trainer.model, trainer.config)
    wrapped = trainer.dist.wrap(trainer.model)
    trainer.model.train()
    times: list[float] = []
    for step in range(count + 1):
        # each process must make the same number: the first one's watch counts
        if trainer.dist.broadcast_int(int(sum(times[1:]) > patience)):
            break
        seed_step(trainer.config.seed, step, trainer.dist.rank)
        begun = time.monotonic()
        train_step(wrapped, optimizers, trainer.objective.batch(step), trainer.objective, trainer.config, trainer.dist, trainer.machine["dtype"])
        times.append(time.monotonic() - begun)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(weights[name])
    timed = times[1 : trainer.objective.period] or times[1:] or times
    seconds = sorted(timed)[len(timed) // 2]
    if trainer.objective.period == 1:
        return seconds
    return seconds + max(0.0, times[0] - seconds) / trainer.objective.period  # what the first of a period takes besides


def evaluations_for(seconds: float, per_evaluation: float, share: float = EVALUATION_SHARE) -> int:
    """How many evaluations a run of `seconds` can afford: EVALUATIONS, or what takes a `share` of it, at least 1."""
    return max(1, min(EVALUATIONS, int(share * seconds / per_evaluation)))


def usable(seconds: float) -> float:
    """What is left for training steps of so many seconds, about."""
    return seconds * (1 - RESERVE - EVALUATION_SHARE)


def steps_for(seconds: float, per_step: float, evaluating: float) -> int:
    """How many steps fit into `seconds`, of which `evaluating` go to evaluations; at least 1."""
    return max(1, int((seconds * (1 - RESERVE) - evaluating) / per_step))


def replanner(seconds: float, most_steps: int | None = None) -> Callable[[State], int | None]:
    """A `replan` for `fit`: at a few points of the run, the number of steps that will end it on time.

    The pace is that of the steps since the look before (in a run that was resumed, first that of all), and a share of
    what evaluations and checkpoints have taken so far.

    Args:
        seconds: the time of the whole run. What is over already is `State.elapsed`.
        most_steps: more are never planned.
    """
    before: tuple[int, float] | None = None

    def replan(state: State) -> int | None:
        nonlocal before
        looks = len(state.replans) - 1  # the first is the plan itself
        if looks >= len(RATE_CHECKS) or not max(1, RATE_CHECKS[looks] * state.steps) <= state.step < state.steps:
            return None
        step, trained = before or (0, 0.0)
        besides = max(0.0, state.elapsed - state.prepared - state.seconds)
        per_step = (state.seconds - trained) / (state.step - step) + besides / state.step
        before = state.step, state.seconds
        steps = state.step + max(1, int((seconds * (1 - RESERVE) - state.elapsed) / per_step))
        return max(state.step + 1, min(steps, most_steps or steps))

    return replan


def seconds_left(until: float, dist: Dist) -> float:
    """Seconds until then, by the watch of rank 0; at least 1."""
    return max(1.0, dist.broadcast_int(int(1000 * (until - time.monotonic()))) / 1000)
