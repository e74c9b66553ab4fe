"""What is wrong with a run, in plain words: from its text before the first step, and from its losses on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bardlet.config import TrainConfig

MOSTLY = 0.5
"""Share of the training text that repeats what stands before it, from which on it is `mostly` duplicated."""
LEAKED = 0.05
"""Share of the validation text that stands in the training text, from which on the validation loss is too good."""
RISEN = 1.15
"""How many times its best value the training loss is when the learning rate is too high; from batch to batch it moves
by a few hundredths."""
STILL = 0.97
"""How much of what it was after the warm-up the training loss is at least when it stands still."""
WORSE = 1.01
"""How many times its best value the validation loss is when a run overfits."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    about: str
    """A word or two: what was looked at."""
    verdict: Literal["ok", "warning", "damaged"]
    said: str
    """What was found and, where it is not ok, what to do about it."""


def of_text(record: Mapping[str, Any]) -> Iterator[Finding]:
    """What the text will do to a run, by the record that its preparation left in run.toml."""
    duplicated, leaked = float(record.get("duplicated", 0.0)), float(record.get("leaked", 0.0))
    if duplicated > MOSTLY:
        yield Finding("text", "warning", f"most of the text is duplicated: {duplicated:.0%} of it repeats what stands "
                      "before it, and teaches nothing new; take the copies out")
    if leaked > LEAKED:
        yield Finding("text", "warning", f"validation text occurs in training: {leaked:.0%} of it stands there word "
                      "for word, so that the validation loss looks better than it is; take the copies out")


def of_losses(lines: Sequence[Mapping[str, Any]], config: TrainConfig, steps: int,
              record: Mapping[str, Any]) -> Iterator[Finding]:
    """What the losses so far say.

    Args:
        lines: of metrics.jsonl.
        steps: planned.
        record: `bigram`, the loss of a table of pairs of characters on the validation text in nats per character, and
            `characters_per_token` of that text.
    """
    train = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    pairs = record.get("bigram", 0.0) * record.get("characters_per_token", 0.0)
    yield from _rate_too_high(train, min(config.warmup_steps, steps // 5), config, pairs)
    yield from _overfitting(train, val, config)
    if val and pairs and config.model != "bigram" and val[-1][0] >= min(steps, max(200, steps // 3)):
        best = min(loss for _, loss in val)
        if best > pairs:
            yield Finding("loss", "warning", f"the loss after step {val[-1][0]:,} is higher than a bigram's: "
                          f"{best:.2f} nats per token, and counting pairs of characters comes to {pairs:.2f}; "
                          "train for longer, or with another learning rate")


def _rate_too_high(train: Sequence[tuple[int, float]], warmup: int, config: TrainConfig,
                   pairs: float) -> Iterator[Finding]:
    """The training loss is far above its best, or stands still since the warm-up, above that of pairs of characters."""
    after = [(step, loss) for step, loss in train if step >= warmup]
    if len(after) < 6:
        return
    at, low = min(train, key=lambda point: point[1])
    then, now = (sum(loss for _, loss in some) / 3 for some in (after[:3], after[-3:]))
    if at < after[-3][0] and min(loss for _, loss in after[-3:]) > RISEN * low:
        yield Finding("learning rate", "warning", "the learning rate is too high: the training loss was "
                      f"{low:.2f} at step {at:,} and is {now:.2f} now; take a lower --lr and --muon-lr")
    elif after[-3][0] > 1.5 * warmup and now > STILL * then and now > pairs:
        wrong, better = ("low", "higher") if config.lr < TrainConfig.lr / 10 else ("high", "lower")
        yield Finding("learning rate", "warning", f"the learning rate is too {wrong}: the training loss stands still "
                      f"at {now:.2f} since step {after[0][0]:,}; take a {better} --lr and --muon-lr")


def _overfitting(train: Sequence[tuple[int, float]], val: Sequence[tuple[int, float]],
                 config: TrainConfig) -> Iterator[Finding]:
    """Since three evaluations or more the validation loss is above its best, while the training loss has fallen."""
    if len(val) < 4:
        return
    at, best = min(val, key=lambda point: point[1])
    before = [loss for step, loss in train if step <= at]
    if at > val[-4][0] or val[-1][1] < WORSE * best or not before or train[-1][1] > before[-1]:
        return
    kept = {"best": f"the weights of step {at:,} are kept", "last": "--keep best would keep the weights of that step",
            "average": "--keep best would keep the weights of that step"}[config.keep]
    yield Finding("overfitting", "warning", f"overfitting since step {at:,}: the validation loss was {best:.3f} there "
                  f"and is {val[-1][1]:.3f} now, while the training loss falls; {kept}; more text, more --dropout or "
                  "fewer --steps help")
