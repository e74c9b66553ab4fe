"""Expected loss of a run on a text, and the meaning of a loss: `planning/scaling_law.py` in words."""

from __future__ import annotations

from bardlet import console
from bardlet.config.settings import flag
from bardlet.planning import scaling_law
from bardlet.run.record import TextRecord

LONGER = (1, 3, 5, 10, 30, 60)
"""Minutes that the end of a run suggests."""


def predict(record: TextRecord, steps: int, characters: float, epochs: float) -> None:
    """Set the record's `expected` for a plan of `steps` that trains on `characters`; None if there is no prediction."""
    record.expected = None
    if record.counting and steps >= scaling_law.MIN_STEPS:
        record.expected = round(scaling_law.predict_loss(record.counting, characters, epochs, record.drift or 0.0), 4)


def describe(record: TextRecord, pretrained: bool) -> str:
    """Return the predicted loss of a plan, or the reason why there is none; empty for a run that was not planned.

    pretrained: True if the run starts from the weights of --init.
    """
    if record.expected:
        return scaling_law.describe(record.expected, record.drift or 0.0)
    shorter = f"no prediction: bardlet predicts the loss of runs of {scaling_law.MIN_STEPS} steps or more"
    if record.counting and record.most_steps and record.most_steps < scaling_law.MIN_STEPS:
        return f"{shorter}; this text is too short for them"
    if record.counting:
        return f"{shorter}; give more --minutes"
    if record.untold:
        few = len(record.untold) < 4
        chosen = ", ".join(map(flag, record.untold)) if few else "model, batch size and learning rates"
        return f"no prediction: there is one only when bardlet chooses {chosen}"
    if record.reasons is None:
        return ""
    if pretrained:
        return "no prediction: there is one only for a new model, not with --init"
    return "no prediction: the text is too short, repeats itself, or its held-out end has other letters than the rest"


def results(record: TextRecord, train_chars: int, at_limit: bool) -> list[str]:
    """Return what generated text reads like, and what more time would bring.

    Args:
        train_chars: characters of the training split.
        at_limit: True if more steps would only memorize the text.
    """
    now = scaling_law.reads_like(record.nats_per_char, record.bigram)
    if not now:
        return []
    if not (record.minutes and record.expected and record.counting) or at_limit:
        return [f"reads like: {now}"]
    minutes = next((m for m in LONGER if m >= 3 * record.minutes), 3 * record.minutes)
    characters = (record.characters or 0.0) * minutes / record.minutes
    later = scaling_law.predict_loss(record.counting, characters, characters / max(1, train_chars), record.drift or 0.0)
    later *= record.nats_per_char / record.expected  # as far from the prediction as this run
    then = scaling_law.reads_like(later, record.bigram)
    if then == now:
        return [f"reads like: {now}"]
    return [f"reads like: {now}; {console.minutes(minutes)} would give about {later:.2f} nats per character: {then}"]
