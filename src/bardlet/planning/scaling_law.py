"""Predict the validation loss of a planned run from n-gram losses, training characters and epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bardlet.planning.plan import SHAPE

BLOCKS_PREDICTION = {*SHAPE, "model", "tokenizer", "vocab_size", "block_size", "dropout", "batch_size", "grad_accum",
                     "optimizer", "lr", "muon_lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_share",
                     "weight_decay", "beta1", "beta2", "grad_clip"}
"""Settings that rule out a prediction if the user sets them: COEFFICIENTS fit plans of `plan` only."""

COEFFICIENTS = (-0.1137, 0.4254, -0.0628, 0.4426, 1.0245)
"""Weights of `features`, by least squares over runs on development splits: `python benchmarks/dial.py law`."""

REPEAT_DECAY = 8.0
"""Repetition counts as at most this many fresh epochs; COEFFICIENTS depend on it. (Chosen while looking at validation
losses of timed runs: LOG.md.)"""

PREDICTION_BAND = 0.15
"""Half-width of the band around a predicted loss, as a share of it: twice the leave-one-corpus-out error (root mean
square; `dial.py law`)."""


def features(counting: Sequence[float], characters: float, epochs: float) -> tuple[float, ...]:
    """Return the features of the prediction: their weighted sum is log(predicted loss / n-gram loss).

    Args:
        counting: n-gram losses, `CorpusStatistics.counting`.
        characters: training characters over all epochs.
        epochs: passes over the corpus.

    Returns:
        (1, the n-gram gain from that many more characters, the number of characters in millions, the n-gram gain from a
        long context and from characters over words), all but the first as logarithms. Repeated characters count less
        with every epoch.
    """
    full_loss, quarter_loss, counted, *gains = counting
    slope = math.log(full_loss / quarter_loss) / math.log(4)  # of log loss over log characters
    fresh = characters
    if epochs > 1:
        fresh = characters / epochs * (1 + REPEAT_DECAY * (1 - math.exp((1 - epochs) / REPEAT_DECAY)))
    return 1.0, slope * math.log(fresh / counted), math.log(fresh / 1e6), *gains


def predict_loss(counting: Sequence[float], characters: float, epochs: float) -> float:
    """Return the predicted validation loss of a plan of `planning.plan`, in nats per character.

    An n-gram model measures how hard the text is; two of them, trained on more and on less of it, measure how much more
    text helps. A network is better by a factor that depends little on the text. Repeated text helps less with every
    epoch (Muennighoff et al., 2023, equation 5). Arguments: see `features`.
    """
    x = features(counting, characters, epochs)
    return counting[0] * math.exp(sum(a * b for a, b in zip(COEFFICIENTS, x, strict=True)))


def describe(expected: float) -> str:
    """Format a predicted loss with the band that nearly all runs fall into."""
    low, high = expected * (1 - PREDICTION_BAND), expected * (1 + PREDICTION_BAND)
    return f"{expected:.2f} nats per character ({low:.2f} to {high:.2f})"
