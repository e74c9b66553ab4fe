"""The predicted validation loss of a planned run, from n-gram losses, characters read and epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bardlet.planning.plan import SHAPE

BLOCKS_PREDICTION = {*SHAPE, "model", "tokenizer", "vocab_size", "block_size", "dropout", "batch_size", "grad_accum", "optimizer",
          "lr", "muon_lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_share", "weight_decay", "beta1", "beta2",
          "grad_clip"}
"""No loss is foretold of a run for which one of these was set: LAW knows the plans of `plan` alone."""

COEFFICIENTS = (-0.1137, 0.4254, -0.0628, 0.4426, 1.0245)
"""Least squares over runs on development splits: `python benchmarks/dial.py law`."""

REPEAT_DECAY = 8.0
"""How many fresh readings of a text its repetition can be worth at most; LAW depends on it. (Chosen with runs of the
dial, on the validation part, in sight: LOG.md.)"""

PREDICTION_BAND = 0.15
"""Half the width of the band around the expected loss, as a share of it: twice what laws fitted to the other texts were
off for a text (root mean square; `dial.py law`)."""


def features(counting: Sequence[float], characters: float, epochs: float) -> tuple[float, ...]:
    """What the loss to expect is computed from: the logarithm of its ratio to counting's is a weighted sum of these.

    Args:
        counting: of a `CorpusStatistics`.
        characters: how many are learned from, those read again counted again.
        epochs: how often the text is read.

    Returns:
        (1, what counting would gain by that many more characters, how many million they are, what a long context and
        what letters are worth to counting), all but the first as logarithms; what is read again counts less and less.
    """
    most, fewer, counted, *worth = counting
    gain = math.log(most / fewer) / math.log(4)  # of the logarithm of the loss, for each of the number of characters
    fresh = characters if epochs <= 1 else characters / epochs * (1 + REPEAT_DECAY * (1 - math.exp((1 - epochs) / REPEAT_DECAY)))
    return 1.0, gain * math.log(fresh / counted), math.log(fresh / 1e6), *worth


def predict_loss(counting: Sequence[float], characters: float, epochs: float) -> float:
    """The validation loss to expect of a plan of `planning.plan`, in nats per character.

    An n-gram model that counted the text knows how hard it is, and two that counted more and less of it know what more
    text is worth. A network is better by a factor that depends little on the text (the arguments: see `features`).
    What is read again is worth less and less (Muennighoff et al., 2023, equation 5).
    """
    of = features(counting, characters, epochs)
    return counting[0] * math.exp(sum(a * x for a, x in zip(COEFFICIENTS, of, strict=True)))


def describe(expected: float) -> str:
    """A predicted loss with the band that nearly all runs fall into."""
    return f"{expected:.2f} ({expected * (1 - PREDICTION_BAND):.2f} to {expected * (1 + PREDICTION_BAND):.2f}) nats per character"
