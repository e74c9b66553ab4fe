"""The rungs: for each, a model of `models/lecture.py`, its training settings, and the loss that the lecture quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from typing import Any

from bardlet.errors import BardletError

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 8, "batch_size": 32, "steps": 5000, "lr": 1e-3}
"""The lecture's settings for the first seven rungs."""
CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 32, "dropout": 0.1, "lr": 1e-3}
"""The scaled rungs on a CPU: about 0.8 M parameters and more than two epochs in two minutes."""
GPU = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2, "steps": 5000,
       "lr": 3e-4}
"""The scaled rungs on a GPU: the lecture's settings."""
LECTURE = {"optimizer": "adamw", "schedule": "constant", "warmup_steps": 0, "beta2": 0.999, "weight_decay": 0.01,
           "grad_clip": 0.0, "keep": "last"}
"""The lecture's training: AdamW with PyTorch's defaults, a constant learning rate, and the last step's weights.

One difference: the lecture's AdamW also decays biases and norm weights, and ours does not (training/optim.py). At a
learning rate of 1e-3, this decay removes a hundred-thousandth of a weight per step.
"""


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder."""

    number: int
    name: str
    title: str
    adds: str
    """The change from the rung before, in a few words."""
    model: str
    """Its name in bardlet.models.FAMILIES."""
    lecture: float | None
    """The lecture's validation loss (Tiny Shakespeare, characters); None if it quotes none."""
    parts: tuple[str, ...]
    """Its classes and functions, in reading order: names in models/lecture.py, models/layers.py or other.py:name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Training settings specific to this rung."""
    after: str = ""
    """The name of the rung that it changes; empty: the previous rung in LADDER."""

    @property
    def scaled(self) -> bool:
        """True if the rung is sized for the machine: CPU or GPU."""
        return self.number >= 8

    @property
    def attends(self) -> bool:
        """True if the rung has attention heads, whose weights on a sentence the report shows."""
        return self.model not in ("bigram", "averaging")


def _rung(number: int, name: str, title: str, adds: str, lecture: float | None, parts: str, model: str = "",
          after: str = "", **settings: Any) -> Rung:
    return Rung(number, name, title, adds, model or name, lecture, tuple(parts.split()), settings, after)


LADDER = (
    _rung(1, "bigram", "The bigram", "a table of which character follows which", 2.5, "BigramModel", steps=3000,
          lr=1e-2),
    _rung(2, "averaging", "An average of the past", "each position becomes the mean of itself and all before it",
          None, "average_by_loop average_by_matrix average_by_softmax AveragingModel"),
    _rung(3, "one-head", "One head of self-attention", "weights that depend on the text, instead of equal ones", 2.40,
          "Head OneHeadModel"),
    _rung(4, "multi-head", "Several heads", "four heads of 8 channels in parallel, instead of one head of 32", 2.28,
          "Head MultiHeadAttention MultiHeadModel"),
    _rung(5, "feed-forward", "Feed-forward", "a layer that processes each position on its own", 2.24,
          "Head MultiHeadAttention FeedForward FeedForwardModel"),
    _rung(6, "residual", "Residual connections", "three blocks that add to a residual stream, and projections", 2.08,
          "Head ProjectedAttention WideFeedForward ResidualBlock ResidualModel"),
    _rung(7, "layer-norm", "LayerNorm", "a norm before each sublayer, and a final norm", 2.06,
          "Head ProjectedAttention WideFeedForward LayerNormBlock LayerNormModel"),
    _rung(8, "dropout", "Dropout and scale", "a larger model, a longer context, and dropout", 1.48,
          "DropoutAttention DropoutFeedForward DropoutBlock DropoutModel init_weights"),
    _rung(9, "rotary", "RMSNorm and rotary positions", "rotary positions replace the table, RMSNorm replaces LayerNorm",
          None, "rope_cos_sin apply_rope RMSNorm RotaryAttention BiaslessFeedForward RotaryBlock RotaryModel"),
    _rung(10, "swiglu", "SwiGLU", "a gate in the feed-forward layer", None,
          "RotaryAttention SwiGLU SwiGLUBlock SwiGLUModel"),
    _rung(11, "qk-norm", "QK-norm", "a norm on queries and keys", None,
          "QKNormAttention SwiGLU QKNormBlock QKNormModel"),
    _rung(12, "muon", "Muon", "Muon instead of AdamW for the weight matrices of the blocks", None,
          "training/optim.py:parameter_groups training/optim.py:build", "qk-norm", optimizer="muon", muon_lr=1e-2),
    _rung(13, "average", "An average of weights", "the mean of the weights over the last fifth of the steps", None,
          "training/averaging.py:add_to_average", "qk-norm", optimizer="muon", muon_lr=1e-2, keep="average"),
)


def predecessor(rung: Rung) -> Rung | None:
    """Return the rung that `rung` changes; None for the first."""
    if rung.after:
        return next(other for other in LADDER if other.name == rung.after)
    return next((other for other in LADDER if other.number == rung.number - 1), None)


def select(text: str) -> tuple[Rung, ...]:
    """Return the rungs that `text` selects by number, range or name: "1-7", "3,5" or "bigram,8-13".

    Raises BardletError for an invalid selection, with a suggestion.
    """
    by_name = {rung.name: rung.number for rung in LADDER}
    selected: set[int] = set()
    for word in (part.strip() for part in text.split(",")):
        first, dash, last = word.partition("-")
        try:
            if word in by_name:
                numbers = range(by_name[word], by_name[word] + 1)
            else:
                numbers = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            numbers = range(0)
        if not numbers or numbers[0] < 1 or numbers[-1] > len(LADDER):
            raise BardletError(f"--rungs {text}: {_selection_error(word)}")
        selected.update(numbers)
    return tuple(rung for rung in LADDER if rung.number in selected)


def _selection_error(word: str) -> str:
    """Return why a part of --rungs is invalid, and a suggestion."""
    count, names = len(LADDER), [rung.name for rung in LADDER]
    first, dash, last = (part.strip() for part in word.partition("-"))
    if first == "0" and last.isdecimal() and int(last):
        return f"there is no rung 0; use 1-{min(int(last), count)}"
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= count:
        if int(last) > count:
            return f"there are {count} rungs; use {first}-{count}"
        if 1 <= int(last) < int(first):
            return f"a range starts with the lower number; use {last}-{first}"
    if first.isdecimal() and not dash:
        return f"there is no rung {word}; use numbers from 1 to {count}"
    near = get_close_matches(word, names, 1)
    return f"'{word}' is not a rung; " + (f"did you mean {near[0]}?" if near else (
        f"use numbers from 1 to {count}, such as 1-7 or 3,5, or names ({', '.join(names)})"))


def place(loss: float, band: Mapping[str, float]) -> str:
    """Return where a loss is beside a normal band of `bands`: normal, lower than normal or higher than normal."""
    return "lower than normal" if loss < band["low"] else "higher than normal" if loss > band["high"] else "normal"


def bands() -> dict[str, dict[str, float]]:
    """Return the normal range of each rung's validation loss over seeds, by name: mean, deviation, low and high.

    benchmarks/ladder.py measures them on Tiny Shakespeare with the settings above and writes the file. low and high
    are the mean -+ 3 standard deviations: with five seeds measured, this covers 19 of 20 further seeds. The losses of
    the scaled rungs depend on the machine, so they have no band. `seconds` is the training time of the fastest seed.
    """
    file = resources.files("bardlet.ladder").joinpath("bands.json")
    return json.loads(file.read_text(encoding="utf-8"))["rungs"] if file.is_file() else {}
