"""Findings about a run: from its text before the first step, and from its losses during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bardlet.config.pretraining import FromScratch
from bardlet.config.settings import Settings

MOSTLY_DUPLICATED = 0.5
"""Share of the training text that repeats earlier text, above which `of_text` warns."""
LEAKED = 0.05
"""Share of the validation text copied from the training text, above which the validation loss is too good."""
RISE = 0.3
"""Nats by which the training loss exceeds its minimum when the learning rate is too high; the noise between batches is
a few hundredths."""
PLATEAU = 0.97
"""Ratio of the training loss now to the loss after warmup, above which the loss counts as stuck."""
LATE = 0.75
"""Share of the steps after which a validation loss above the bigram's is a problem."""
MEMORIZED_EPOCHS, MEMORIZED_RATIO, MEMORIZED_GAP = 5, 3.0, 0.3
"""Epochs of fine-tuning on conversations, ratio of the held-out loss to the training loss, and difference of the two in
nats per token: a finished run with more of each has memorized its conversations."""
CHECKS = 20
"""Number of times a run checks its losses during training."""
OVERFIT_RATIO = 1.02
"""Ratio of the validation loss to its minimum, in the last three evaluations of a run, that counts as overfitting."""
EARLY_OVERFIT_RATIO = 1.1
"""The same before the last step, if the loss also rises from each evaluation to the next. Smaller rises may vanish: the
decay of the learning rate lowers the loss by up to 8 %."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    about: str
    """The subject, in a word or two."""
    verdict: Literal["ok", "warning", "damaged"]
    message: str
    """The observation and, unless the verdict is ok, the remedy."""


def ok(about: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(about, "ok", message)


def warning(about: str, message: str) -> Finding:
    """Return a finding about a setup that works, but not as well as it could."""
    return Finding(about, "warning", message)


def damaged(about: str, message: str) -> Finding:
    """Return a finding about a file whose contents changed."""
    return Finding(about, "damaged", message)


def of_text(record: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the problems of the text, from the corpus statistics in the run's record."""
    duplicated, leaked = float(record.get("duplicated", 0.0)), float(record.get("leaked", 0.0))
    problems = []
    if drift := record.get("drift"):
        yield warning("text", "the held-out end of the text is unlike the rest, as in a chronological text: n-gram "
                      f"models find it {drift:.0%} harder than passages between, and the validation loss will be high")
    if duplicated > MOSTLY_DUPLICATED:
        problems.append(f"most of the text is duplicated: {duplicated:.0%} of it repeats earlier text")
    if leaked > LEAKED:
        problems.append(f"validation text occurs in training: {leaked:.0%} of it is copied word for word, "
                        "so the validation loss looks too good")
    if problems:
        yield warning("text", f"{'; '.join(problems)}; remove the copies")


def of_run(lines: Sequence[Mapping[str, Any]], config: Settings, steps: int,
           record: Mapping[str, Any]) -> list[Finding]:
    """Return the findings of `of_losses` (same arguments) for a whole run.

    Includes the last warning about the learning rate during training: as the rate decays, the losses fall all the same.
    """
    earlier: list[Finding] = []
    for part in range(1, CHECKS):
        so_far = [line for line in lines if line["step"] <= steps * part // CHECKS]
        findings = of_losses(so_far, config, steps, record)
        earlier = [finding for finding in findings if finding.about == "learning rate"] or earlier
    now = list(of_losses(lines, config, steps, record))
    return now if any(finding.about == "learning rate" for finding in now) else earlier + now


def of_losses(lines: Sequence[Mapping[str, Any]], config: Settings, steps: int,
              record: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the problems that the losses so far show.

    Args:
        lines: the lines of metrics.jsonl.
        config: the settings of the run.
        steps: planned steps.
        record: `bigram`, the loss of a character bigram on the validation text in nats per character;
            `characters_per_token` of that text; `guessing`, the loss of the uniform distribution over tokens.
    """
    train = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    bigram = record.get("bigram", 0.0) * record.get("characters_per_token", 0.0)
    overfitting = list(_overfitting(train, val, config, steps))
    yield from overfitting or _memorizing(train, val, config, steps, record)
    yield from _rising(train, record.get("guessing", 0.0) if not config.init else 0.0)
    if not bigram or (isinstance(config, FromScratch) and config.model == "bigram"):  # nothing to compare with
        return
    yield from _plateau(train, min(config.warmup_steps, steps // 5), config, bigram)
    if val and val[-1][0] >= LATE * steps:
        best = min(loss for _, loss in val)
        if best > bigram:
            unit = "character" if record["characters_per_token"] == 1 else "token"
            yield warning("loss", f"the loss after step {val[-1][0]:,} is higher than a bigram's: "
                          f"{best:.2f} nats per {unit}, against {bigram:.2f} for counting character pairs; "
                          "train longer, or change the learning rate")


def _rising(train: Sequence[tuple[int, float]], guessing: float) -> Iterator[Finding]:
    """Warn if the training loss was far above `guessing`, or stayed above its smoothed minimum for three lines."""
    at, worst = max(train, key=lambda point: point[1], default=(0, 0.0))
    if guessing and worst > guessing + 1:
        yield warning("learning rate", f"the learning rate is too high: the training loss was {worst:,.2f} "
                      f"at step {at:,}, and uniform guessing gives {guessing:.2f}; lower --lr and --muon-lr")
        return
    if len(train) < 5:
        return
    smooth = [(train[i][0], sum(loss for _, loss in train[i - 1:i + 2]) / 3) for i in range(1, len(train) - 1)]
    at, low = min(smooth, key=lambda point: point[1])
    if at < train[-3][0] and min(loss for _, loss in train[-3:]) > low + RISE:
        yield warning("learning rate", "the learning rate is too high: the training loss rose from "
                      f"{low:.2f} at step {at:,} to {smooth[-1][1]:.2f}; lower --lr and --muon-lr")


def _plateau(train: Sequence[tuple[int, float]], warmup: int, config: Settings, bigram: float) -> Iterator[Finding]:
    """Warn if the training loss has hardly fallen since warmup and is above the bigram's."""
    after = [(step, loss) for step, loss in train if step >= warmup]
    if len(after) < 6 or after[-3][0] <= 1.5 * warmup:
        return
    then, now = (sum(loss for _, loss in points) / 3 for points in (after[:3], after[-3:]))
    if PLATEAU * then < now < then + RISE and now > bigram:
        verdict, remedy = ("low", "raise") if config.lr < Settings.lr / 10 else ("high", "lower")
        yield warning("learning rate", f"the learning rate is too {verdict}: the training loss has been stuck "
                      f"at {now:.2f} since step {after[0][0]:,}; {remedy} --lr and --muon-lr")


def _overfitting(train: Sequence[tuple[int, float]], val: Sequence[tuple[int, float]],
                 config: Settings, steps: int) -> Iterator[Finding]:
    """Warn if the validation loss has been above its minimum for three evaluations while the training loss fell."""
    if len(val) < 4:
        return
    at, best = min(val, key=lambda point: point[1])
    before = [loss for step, loss in train if step <= at]
    since, ended = [loss for _, loss in val[-3:]], val[-1][0] >= steps
    if at > val[-4][0] or not before or train[-1][1] > before[-1]:
        return
    if min(since) < (OVERFIT_RATIO if ended else EARLY_OVERFIT_RATIO) * best or not (ended or since == sorted(since)):
        return
    advice = "--keep best would keep the weights of that step"
    kept = {"best": f"the weights of step {at:,} are kept so far", "last": advice, "average": advice}[config.keep]
    yield warning("fit", f"overfitting since step {at:,}: the validation loss rose from {best:.3f} "
                  f"to {val[-1][1]:.3f} while the training loss fell; {kept}; use more text, more "
                  "--weight-decay or --dropout, or a shorter run")


def _memorizing(train: Sequence[tuple[int, float]], val: Sequence[tuple[int, float]], config: Settings, steps: int,
                record: Mapping[str, Any]) -> Iterator[Finding]:
    """Warn if a finished `sft` predicts its conversations far better than the held-out ones."""
    epochs = steps / max(1, int(record.get("batches") or steps))
    if config.stage != "sft" or not train or not val or val[-1][0] < steps or epochs <= MEMORIZED_EPOCHS:
        return
    seen, held_out = train[-1][1], val[-1][1]
    if held_out > MEMORIZED_RATIO * seen and held_out > seen + MEMORIZED_GAP:
        yield warning("fit", f"the model has memorized its {int(record.get('documents') or 0):,} conversations in "
                      f"{epochs:,.0f} epochs: the loss is {seen:.3f} on them and {held_out:.3f} on held-out ones; use "
                      "more conversations, or fewer --steps")


def refutation(lines: Sequence[Mapping[str, Any]], step: int) -> str | None:
    """Return a message if the validation loss fell to a new minimum after the warning of overfitting at `step`."""
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    best = min((loss for at, loss in val if at <= step), default=0.0)
    lower = next(((at, loss) for at, loss in val if at > step and loss < best), None)
    if lower is None:
        return None
    return (f"no overfitting after all: the validation loss fell again, to {lower[1]:.3f} at step {lower[0]:,}, below "
            f"its minimum of {best:.3f} before the warning at step {step:,}")
