"""Findings about reinforcement learning: no signal, collapse, a reward that is gamed, a reward that does not rise.

The loss says nothing here. It compares the policy with the one that sampled the rollout, so it begins at 0 and stays
near it, also in a run that learns well. The findings come from the statistics of the rollouts in metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bardlet.config.finetuning import EXACT, RolloutConfig
from bardlet.run.diagnosis import Finding, ok, warning

LAST = 3
"""Rollouts whose mean counts as the present. One rollout alone is noisy."""
EQUAL = 1e-6
"""Deviation of the rewards, relative to their size, up to which they count as equal."""
ALIKE = 0.5
"""Share of the distinct completions at the start, below which completions have become alike."""
GAIN = 0.5
"""Rise of the reward, in deviations of a completion's reward at the start, that is no accident: the mean of a rollout
of 128 completions varies by 0.09."""
DRIFT = 0.1
"""Rise in the same unit, below which the reward counts as unchanged."""
LENGTH = 1.8
"""Ratio of the lengths of completions, now and at the start, that the reward alone may have caused."""
FAR = 1.0
"""KL in nats per token, above which little is left of the model before. Runs that learn stay below 0.2."""
PATIENCE = 0.3
"""Share of the steps after which a reward should have risen."""
STILL = 0.05
"""KL in nats per completion, below which the policy has hardly moved."""


@dataclass(frozen=True)
class Point:
    """The mean statistics of one or more rollouts; see `stages/rollout.py:RolloutStats`. accuracy: None if unknown."""

    step: int
    reward: float
    kl: float
    tokens: float
    ended: float
    different: float
    deviation: float
    accuracy: float | None

    @property
    def is_equal(self) -> bool:
        """True if the rewards that are compared differ by rounding errors at most."""
        return self.deviation <= EQUAL * max(1.0, abs(self.reward))


def points_of(lines: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return a point for each rollout in the lines of metrics.jsonl; a rollout may have several lines."""
    points: list[Point] = []
    last = None
    for line in lines:
        if "rollout" in line and line["rollout"] != last:  # not an evaluation, nor of an older version
            last = line["rollout"]
            points.append(Point(line["step"], line["reward"], line["kl"], line["answer_tokens"], line["ended"],
                                line["different"], line["deviation"], line.get("accuracy")))
    return points


def of_rollouts(lines: Sequence[Mapping[str, Any]], config: RolloutConfig, steps: int,
                record: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the findings of the rollouts so far.

    Args:
        lines: the lines of metrics.jsonl.
        config: the settings of the run.
        steps: planned steps.
        record: of the run; it has the reward before training (see `RolloutsRecord`).
    """
    points = points_of(lines)
    if len(points) < LAST:
        return
    first, now = _before(record, points[0]), _mean(points[-LAST:])
    unit = max(first.deviation, EQUAL * max(1.0, abs(first.reward)))
    gain = (now.reward - first.reward) / unit
    if all(point.is_equal for point in points[-LAST:]):
        yield _collapsed(first, now, gain) or _without_signal(now, points, config)
        return
    exact = config.reward == EXACT  # a right answer is all that it pays for
    problem = ((None if exact else _gamed(first, now, gain)) or _collapsed(first, now, gain)
               or _by_heart(lines, now, gain, unit))
    if problem is None and now.step >= PATIENCE * steps and gain < DRIFT:
        problem = _unchanged(first, now, gain)
    if problem:
        yield problem


def of_loss(lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Explain the loss, which looks wrong to those who know pretraining."""
    losses = [line["train_loss"] for line in lines if line.get("train_loss") is not None]
    if losses:
        yield ok("loss", f"{losses[0]:z.4f} at first, {losses[-1]:z.4f} now: it begins near 0 and stays small, because "
                 "it compares the policy with the one that wrote the answers; reward and KL tell if it learns")


def _without_signal(now: Point, points: Sequence[Point], config: RolloutConfig) -> Finding:
    since = next(point.step for i, point in enumerate(points) if all(each.is_equal for each in points[i:]))
    if config.reward == EXACT and now.reward > 0.99:
        return ok("reward", f"every completion since step {since:,} is right: these prompts have nothing left to teach")
    return warning("reward", f"no signal: since step {since:,} all completions that are compared get the same reward, "
                   f"{now.reward:z.3g}, so no step changes the model; use a reward with more than one value, prompts "
                   "of which the model solves some, or fine-tune it first")


def _gamed(first: Point, now: Point, gain: float) -> Finding | None:
    """Return a finding if the reward rose while something that it should stand for fell."""
    if gain < GAIN:
        return None
    rise = f"the reward rose from {first.reward:z.3g} to {now.reward:z.3g}"
    if first.accuracy is not None and now.accuracy is not None:
        if now.accuracy < first.accuracy * (1 - ALIKE / 2) and first.accuracy - now.accuracy > 0.03:
            return warning("reward", f"the reward is gamed: {rise}, while the share of right answers fell from "
                           f"{first.accuracy:.0%} to {now.accuracy:.0%}; the reward pays for something else; read the "
                           "answers (--watch), mend the reward, or raise --beta")
        if now.accuracy > first.accuracy + 0.03:
            return None
    signs = []
    if now.tokens > LENGTH * first.tokens or now.tokens * LENGTH < first.tokens:
        signs.append(f"the answers went from {first.tokens:.0f} to {now.tokens:.0f} tokens")
    if now.different < ALIKE * first.different:
        signs.append(f"{now.different:.0%} of them are distinct, {first.different:.0%} at the start")
    if not signs:
        return None
    return warning("reward", f"the reward may be gamed: {rise}, and {' and '.join(signs)}; read the answers (--watch); "
                   "if they got worse, mend the reward or raise --beta")


def _collapsed(first: Point, now: Point, gain: float) -> Finding | None:
    """Return a finding if the policy left its reference without a higher reward."""
    if gain >= DRIFT:
        return None
    signs = []
    if now.different < ALIKE * first.different:
        signs.append(f"{now.different:.0%} of the answers are distinct, {first.different:.0%} at the start")
    if now.ended < ALIKE * first.ended:
        signs.append(f"{now.ended:.0%} of them end, {first.ended:.0%} at the start")
    if gain < -DRIFT:
        signs.append(f"the reward fell from {first.reward:z.3g} to {now.reward:z.3g}")
    far = now.kl > FAR * now.tokens
    if not far and (now.kl < STILL or not signs or (gain > -GAIN and len(signs) < 2)):
        return None
    said = ", ".join(signs) or "its answers are no better"
    return warning("reward", f"the policy collapsed: {said}, at a KL of {now.kl:.3g} nats per answer from the model "
                   "before; start again with a lower --lr and --muon-lr, or a larger --beta")


def _by_heart(lines: Sequence[Mapping[str, Any]], now: Point, gain: float, unit: float) -> Finding | None:
    """Return a finding if the reward rose on the training prompts only."""
    held_out = [-line["val_loss"] for line in lines if line.get("val_loss") is not None]
    if gain < GAIN or len(held_out) < LAST or max(held_out[-LAST:]) >= held_out[0] + DRIFT * unit:
        return None
    return warning("reward", f"the reward rises on the training prompts only, to {now.reward:z.3g}; on held-out ones "
                   f"it stays at {held_out[-1]:z.3g}: the model learns these answers by heart; use more prompts")


def _unchanged(first: Point, now: Point, gain: float) -> Finding:
    """Return the finding for a reward that has not risen."""
    said = f"the reward does not rise: {first.reward:z.3g} at first, {now.reward:z.3g} now"
    if now.kl < STILL:
        return warning("reward", f"{said}; the policy has hardly moved (KL {now.kl:.2g} nats per answer); raise --lr "
                       "and --muon-lr")
    return warning("reward", f"{said}, although the policy has moved (KL {now.kl:.2g} nats per answer): it follows "
                   "chance differences; use a larger --rollout, or a reward that tells good answers from bad")


def _before(record: Mapping[str, Any], first: Point) -> Point:
    """Return the statistics before training, as far as the record has them, else those of the first rollout.

    The share of distinct completions depends on their number, so it is always that of a rollout.
    """
    accuracy = record.get("accuracy_before", first.accuracy)
    return Point(0, record.get("reward_mean", first.reward), 0.0, record.get("answer_length_before", first.tokens),
                 record.get("ended_before", first.ended), first.different,
                 record.get("reward_deviation", first.deviation), accuracy)


def _mean(points: Sequence[Point]) -> Point:
    def mean(name: str) -> float:
        return sum(getattr(point, name) for point in points) / len(points)

    return Point(points[-1].step, mean("reward"), mean("kl"), mean("tokens"), mean("ended"), mean("different"),
                 mean("deviation"), None if points[-1].accuracy is None else mean("accuracy"))
