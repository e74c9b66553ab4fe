"""Expected loss of a run on a text, and the meaning of a loss: `planning/scaling_law.py` in words."""

from __future__ import annotations

from bardlet import console
from bardlet.config.settings import flag
from bardlet.planning import scaling_law
from bardlet.run.diagnosis import Finding, ok, warning
from bardlet.run.record import TextRecord

LONGER = (1, 3, 5, 10, 30, 60)
"""Minutes that the end of a run suggests."""
HARDLY = 0.85
"""Ratio of a loss to the bigram's, above which a model of a script without an alphabet has learned little more."""
POOR = tuple(text for maximum, text in scaling_law.READS_LIKE if maximum > 0.55)
"""Descriptions of generated text that is no language yet."""


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
    minutes, later, then = _longer(record, train_chars)
    if then == now:
        return [f"reads like: {now}"]
    return [f"reads like: {now}; {console.minutes(minutes)} would give about {later:.2f} nats per character: {then}"]


def _longer(record: TextRecord, train_chars: float) -> tuple[float, float, str]:
    """Return (minutes of a longer run, its predicted loss, what that reads like) for a run with a prediction."""
    assert record.minutes and record.expected and record.counting
    minutes = _more(record.minutes)
    characters = (record.characters or 0.0) * minutes / record.minutes
    later = scaling_law.predict_loss(record.counting, characters, characters / max(1.0, train_chars),
                                     record.drift or 0.0)
    later *= record.nats_per_char / record.expected  # as far from the prediction as this run
    return minutes, later, scaling_law.reads_like(later, record.bigram)


def _more(minutes: float) -> float:
    """Return about three times as many minutes."""
    return next((m for m in LONGER if m >= 3 * minutes), 3 * minutes)


def judge(record: TextRecord, loss: float, finished: bool) -> Finding:
    """Return a finding on a loss: is it normal, and what would lower it first.

    Args:
        loss: the lowest validation loss of the run so far, in nats per character.
        finished: False for a run that has steps left, whose loss the prediction does not concern.
    """
    bigram, best = record.bigram, record.counting and record.counting[0]
    if not bigram:
        return warning("quality", f"{loss:.2f} nats per character; without statistics of the text, bardlet cannot say "
                       "if that is normal; read a sample: `bardlet sample RUN`")
    reads = scaling_law.reads_like(loss, bigram)
    beaten = [f"{'below' if loss < other else 'above'} the {other:.2f} of counting {counted}"
              for other, counted in ((bigram, "character pairs"), (best, "longer pieces")) if other]
    said = f"{loss:.2f} nats per character{f' reads like: {reads}' if reads else ''}; it is {', '.join(beaten)}"
    low, high = scaling_law.band(record.expected, record.drift or 0.0) if record.expected and finished else (0.0, 0.0)
    if high:
        place = "above" if loss > high else "below" if loss < low else "as"
        said += f"; {place} predicted ({low:.2f} to {high:.2f})"
    if reads == scaling_law.READS_LIKE[0][1]:
        return warning("quality", f"{said}; a low loss on such a text says little: remove what repeats")
    hardly = not reads and loss > HARDLY * bigram
    poor = loss > (best or bigram) or (high and loss > high) or reads in POOR or hardly
    if not poor:
        return ok("quality", said)
    if not finished:
        return warning("quality", f"{said}; the run is not finished: let it go on")
    return warning("quality", f"{said}; first {_remedy(record, loss, high)}")


def _remedy(record: TextRecord, loss: float, high: float) -> str:
    """Return what to change first."""
    train_chars = record.tokens * record.characters_per_token
    if record.untold:
        return f"leave {', '.join(map(flag, record.untold))} to bardlet, which picks them for the text and the machine"
    if high and loss > high:
        return "look at the warnings about the learning rate and the text; without one, run it again with free cores"
    if record.most_steps and (record.steps or 0) >= record.most_steps:
        return f"give it more text: {train_chars:,.0f} characters are few, and more steps would memorize them"
    if not (record.minutes and record.expected and record.counting):
        return f"train longer, with --minutes {_more(record.minutes or 1.0):g}"
    minutes, later, then = _longer(record, train_chars)
    return f"train longer: --minutes {minutes:g} would give about {later:.2f}{f' ({then})' if then else ''}"
