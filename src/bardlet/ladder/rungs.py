"""What the rungs are: a model of `models/lecture.py`, how it is trained, and what the lecture saw."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from typing import Any

from bardlet.errors import BardletError

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 8, "batch_size": 32, "steps": 5000, "lr": 1e-3}
"""The lecture's own settings for the first seven rungs."""
CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 32, "dropout": 0.1, "lr": 1e-3}
"""The scaled rungs on a CPU: about 0.8 M parameters, which see the text more than twice in two minutes."""
GPU = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2, "steps": 5000,
       "lr": 3e-4}
"""The scaled rungs on a GPU: the lecture's own."""
LECTURE = {"optimizer": "adamw", "schedule": "constant", "warmup_steps": 0, "beta2": 0.999, "weight_decay": 0.01,
           "grad_clip": 0.0, "keep": "last"}
"""How the lecture trains: AdamW with PyTorch's defaults, at a constant learning rate, and the last weights count.

One thing differs: the lecture's AdamW decays biases and the weights of norms, too, ours does not
(training/optim.py). At a learning rate of 1e-3 such a decay takes a hundred-thousandth of a weight a step.
"""


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder."""

    number: int
    name: str
    title: str
    adds: str
    """What it adds to the rung before, in a few words."""
    model: str
    """Its name in bardlet.models.FAMILIES."""
    lecture: float | None
    """The validation loss that the lecture quotes (Tiny Shakespeare, characters)."""
    parts: tuple[str, ...]
    """Its classes and functions, in reading order: names in models/lecture.py, models/layers.py or other.py:name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What it trains with that the others do not."""
    after: str = ""
    """The name of the rung that it changes; empty: the one before it in LADDER."""

    @property
    def scaled(self) -> bool:
        """Whether it is one of those that are sized to the machine."""
        return self.number >= 8


def _rung(number: int, name: str, title: str, adds: str, lecture: float | None, parts: str, model: str = "",
          after: str = "", **settings: Any) -> Rung:
    return Rung(number, name, title, adds, model or name, lecture, tuple(parts.split()), settings, after)


LADDER = (
    _rung(1, "bigram", "The bigram", "a table: which character follows which", 2.5, "BigramModel", steps=3000,
          lr=1e-2),
    _rung(2, "averaging", "An average of the past", "each position becomes the mean of itself and all before it", None,
          "average_by_loop average_by_matrix average_by_softmax AveragingModel"),
    _rung(3, "one-head", "One head of self-attention", "weights that depend on the text, in place of equal ones", 2.40,
          "Head OneHeadModel"),
    _rung(4, "multi-head", "Several heads", "four heads of 8 channels side by side, in place of one of 32", 2.28,
          "Head MultiHeadAttention MultiHeadModel"),
    _rung(5, "feed-forward", "Feed-forward", "a layer in which each position thinks for itself", 2.24,
          "Head MultiHeadAttention FeedForward FeedForwardModel"),
    _rung(6, "residual", "Residual connections", "three blocks whose parts add to a stream, with projections", 2.08,
          "Head ProjectedAttention WideFeedForward ResidualBlock ResidualModel"),
    _rung(7, "layer-norm", "LayerNorm", "a norm before each part, and a last one", 2.06,
          "Head ProjectedAttention WideFeedForward LayerNormBlock LayerNormModel"),
    _rung(8, "dropout", "Dropout and scale", "a larger model, a longer context, and dropout", 1.48,
          "DropoutAttention DropoutFeedForward DropoutBlock DropoutModel init_weights"),
    _rung(9, "rotary", "RMSNorm and rotary positions", "turns for the table of positions, RMSNorm for LayerNorm", None,
          "rotary rotate RMSNorm RotaryAttention BiaslessFeedForward RotaryBlock RotaryModel"),
    _rung(10, "swiglu", "SwiGLU", "a gate in the feed-forward layer", None,
          "RotaryAttention SwiGLU SwiGLUBlock SwiGLUModel"),
    _rung(11, "qk-norm", "QK-norm", "a norm on queries and keys", None,
          "QKNormAttention SwiGLU QKNormBlock QKNormModel"),
    _rung(12, "muon", "Muon", "Muon in place of AdamW for the matrices of the blocks", None,
          "training/optim.py:parameter_groups training/optim.py:build", "qk-norm", optimizer="muon", muon_lr=1e-2),
    _rung(13, "average", "An average of weights", "the mean of the weights over the last fifth of the steps", None,
          "training/averaging.py:_add_to_average", "qk-norm", optimizer="muon", muon_lr=1e-2, keep="average"),
)


def before(rung: Rung) -> Rung | None:
    """The rung that `rung` is compared with; None for the first."""
    if rung.after:
        return next(other for other in LADDER if other.name == rung.after)
    return next((other for other in LADDER if other.number == rung.number - 1), None)


def select(text: str) -> tuple[Rung, ...]:
    """The rungs that `text` names: numbers, names and ranges, as in "1-7", "3,5" or "bigram,8-13".

    Raises BardletError for what names none, and says what was probably meant.
    """
    by_name = {rung.name: rung.number for rung in LADDER}
    chosen: set[int] = set()
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
            raise BardletError(f"--rungs {text}: {_no_rungs(word)}")
        chosen.update(numbers)
    return tuple(rung for rung in LADDER if rung.number in chosen)


def _no_rungs(word: str) -> str:
    """Why a part of --rungs names no rung, and what would."""
    most, names = len(LADDER), [rung.name for rung in LADDER]
    first, dash, last = (part.strip() for part in word.partition("-"))
    if first == "0" and last.isdecimal() and int(last):
        return f"there is no rung 0; take 1-{min(int(last), most)}"
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= most:
        if int(last) > most:
            return f"there are {most} rungs; take {first}-{most}"
        if 1 <= int(last) < int(first):
            return f"a range goes from the lower rung to the higher; take {last}-{first}"
    if first.isdecimal() and not dash:
        return f"there is no rung {word}; give numbers from 1 to {most}"
    near = get_close_matches(word, names, 1)
    return f"'{word}' names no rung; " + (f"did you mean {near[0]}?" if near else (
        f"give numbers from 1 to {most}, as in 1-7 or 3,5, or names ({', '.join(names)})"))


def bands() -> dict[str, dict[str, float]]:
    """What is normal, by the name of a rung: mean and deviation of the validation loss over seeds, and low and high.

    Measured on Tiny Shakespeare with the settings above by benchmarks/ladder.py, which writes the file. low and high
    are the mean -+ 3 deviations: of five seeds known, 19 of 20 further ones lie in between. The scaled rungs' losses
    depend on the machine and have none. `seconds`: training time of the fastest seed, where it was measured.
    """
    file = resources.files("bardlet.ladder").joinpath("bands.json")
    return json.loads(file.read_text(encoding="utf-8"))["rungs"] if file.is_file() else {}
