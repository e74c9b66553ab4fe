"""What is wrong with a run, in plain words: from its text before the first step, and from its losses on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bardlet.config.pretraining import FromScratch
from bardlet.config.settings import Settings

MOSTLY = 0.5
"""Share of the training text that repeats what stands before it, from which on it is `mostly` duplicated."""
LEAKED = 0.05
"""Share of the validation text that stands in the training text, from which on the validation loss is too good."""
RISEN = 0.3
"""Nats by which the training loss is above its best value when the learning rate is too high; from batch to batch it
moves by a few hundredths."""
STILL = 0.97
"""How much of what it was after the warm-up the training loss is at least when it stands still."""
LATE = 0.75
"""Share of the steps after which a loss that is higher than a bigram's is no matter of patience any more."""
LOOKS = 20
"""How often a run looks at its losses on its way."""
WORSE = 1.02
"""How many times its best value the validation loss is, three times, when a run overfits: by less it may rise, and fall
again when the learning rate does."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    about: str
    """A word or two: what was looked at."""
    verdict: Literal["ok", "warning", "damaged"]
    message: str
    """What was found and, where it is not ok, what to do about it."""


def ok(about: str, said: str) -> Finding:
    """Nothing to do."""
    return Finding(about, "ok", said)


def warning(about: str, said: str) -> Finding:
    """Something works less well than it could."""
    return Finding(about, "warning", said)


def damaged(about: str, said: str) -> Finding:
    """A file is not what it was."""
    return Finding(about, "damaged", said)


def of_text(record: Mapping[str, Any]) -> Iterator[Finding]:
    """What the text will do to a run, by the record that its preparation left in run.toml."""
    duplicated, leaked = float(record.get("duplicated", 0.0)), float(record.get("leaked", 0.0))
    if duplicated > MOSTLY:
        yield warning("text", f"most of the text is duplicated: {duplicated:.0%} of it repeats what stands "
                      "before it, and teaches nothing new; take the copies out")
    if leaked > LEAKED:
        yield warning("text", f"validation text occurs in training: {leaked:.0%} of it stands there word "
                      "for word, so that the validation loss looks better than it is; take the copies out")


def of_run(lines: Sequence[Mapping[str, Any]], config: Settings, steps: int,
           record: Mapping[str, Any]) -> list[Finding]:
    """What the losses of a run say; and of its learning rate what they said while it trained, for when that falls the
    losses do, too. Arguments as of `of_losses`.
    """
    found: list[Finding] = []
    for part in range(1, LOOKS):
        so_far = [line for line in lines if line["step"] <= steps * part // LOOKS]
        found = [one for one in of_losses(so_far, config, steps, record) if one.about == "learning rate"] or found
    now = list(of_losses(lines, config, steps, record))
    return now if any(one.about == "learning rate" for one in now) else found + now


def of_losses(lines: Sequence[Mapping[str, Any]], config: Settings, steps: int,
              record: Mapping[str, Any]) -> Iterator[Finding]:
    """What the losses so far say.

    Args:
        lines: of metrics.jsonl.
        steps: planned.
        record: `bigram`, the loss of a table of pairs of characters on the validation text in nats per character;
            `characters_per_token` of that text; `guessing`, the loss where each token is as likely as any other.
    """
    train = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    pairs = record.get("bigram", 0.0) * record.get("characters_per_token", 0.0)
    yield from _overfitting(train, val, config)
    yield from _rising(train, record.get("guessing", 0.0) if not config.init else 0.0)
    if not pairs or (isinstance(config, FromScratch) and config.model == "bigram"):  # nothing to be compared with
        return
    yield from _plateau(train, min(config.warmup_steps, steps // 5), config, pairs)
    if val and val[-1][0] >= LATE * steps:
        best = min(loss for _, loss in val)
        if best > pairs:
            yield warning("loss", f"the loss after step {val[-1][0]:,} is higher than a bigram's: "
                          f"{best:.2f} nats per token, and counting pairs of characters comes to {pairs:.2f}; "
                          "train for longer, or with another learning rate")


def _rising(train: Sequence[tuple[int, float]], guessing: float) -> Iterator[Finding]:
    """The training loss was far above that of guessing, or has been above the best mean of three for three lines."""
    at, worst = max(train, key=lambda point: point[1], default=(0, 0.0))
    if guessing and worst > guessing + 1:
        yield warning("learning rate", f"the learning rate is too high: the training loss was {worst:,.2f} "
                      f"at step {at:,}, and guessing costs {guessing:.2f}; take a lower --lr and --muon-lr")
        return
    if len(train) < 5:
        return
    smooth = [(train[i][0], sum(loss for _, loss in train[i - 1:i + 2]) / 3) for i in range(1, len(train) - 1)]
    at, low = min(smooth, key=lambda point: point[1])
    if at < train[-3][0] and min(loss for _, loss in train[-3:]) > low + RISEN:
        yield warning("learning rate", "the learning rate is too high: the training loss was "
                      f"{low:.2f} at step {at:,} and is {smooth[-1][1]:.2f} now; take a lower --lr and --muon-lr")


def _plateau(train: Sequence[tuple[int, float]], warmup: int, config: Settings,
                    pairs: float) -> Iterator[Finding]:
    """Since the warm-up the training loss has hardly fallen, and is above that of pairs of characters."""
    after = [(step, loss) for step, loss in train if step >= warmup]
    if len(after) < 6 or after[-3][0] <= 1.5 * warmup:
        return
    then, now = (sum(loss for _, loss in some) / 3 for some in (after[:3], after[-3:]))
    if STILL * then < now < then + RISEN and now > pairs:
        wrong, better = ("low", "higher") if config.lr < Settings.lr / 10 else ("high", "lower")
        yield warning("learning rate", f"the learning rate is too {wrong}: the training loss stands still "
                      f"at {now:.2f} since step {after[0][0]:,}; take a {better} --lr and --muon-lr")


def _overfitting(train: Sequence[tuple[int, float]], val: Sequence[tuple[int, float]],
                 config: Settings) -> Iterator[Finding]:
    """For three evaluations or more the validation loss is above its best, while the training loss has fallen."""
    if len(val) < 4:
        return
    at, best = min(val, key=lambda point: point[1])
    before = [loss for step, loss in train if step <= at]
    since = min(loss for _, loss in val[-3:])
    if at > val[-4][0] or since < WORSE * best or not before or train[-1][1] > before[-1]:
        return
    would = "--keep best would keep the weights of that step"
    kept = {"best": f"the weights of step {at:,} are kept so far", "last": would, "average": would}[config.keep]
    yield warning("fit", f"overfitting since step {at:,}: the validation loss was {best:.3f} there "
                  f"and is {val[-1][1]:.3f} now, while the training loss falls; {kept}; more text, more "
                  "--weight-decay or --dropout, or fewer --steps help")
