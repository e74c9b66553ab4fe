"""What an experiment is: a question, what came out of computing it, and a picture.

The experiments stand in `experiments_attention.py` and `experiments_training.py`; `experiments.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bardlet.config.pretraining import TrainConfig
from bardlet.ladder import rungs
from bardlet.ladder.pictures import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = TrainConfig(model="layer-norm", **rungs.SMALL).model_config(65)  # type: ignore[arg-type]
"""The lecture's small model: 65 characters, and the sizes of the ladder's small rungs."""


@dataclass(frozen=True)
class Experiment:
    """One experiment, run. Its sentences hold no numbers of their own: each is one of `figures`."""

    name: str
    title: str
    question: str
    """One sentence."""
    conclusion: tuple[str, ...]
    """What was found: sentences with places for the figures, as in "the variance is {variance:.2f}"."""
    figures: Mapping[str, float]
    """Every number that was computed, by name."""
    paint: Callable[[Palette], Figure] | None = None
    """Draws it, for `pictures.draw`."""

    @property
    def lines(self) -> list[str]:
        """What was found, with its numbers, as plain text: a sentence or two each."""
        return [sentence.format_map(self.figures) for sentence in self.conclusion]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global generator starts at `seed`; afterwards it stands where it stood.

    PyTorch's layers draw their first weights from it, and dropout its zeros. Everything else in an experiment has a
    generator of its own.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would touch a GPU's, too
    try:
        yield
    finally:
        torch.set_rng_state(before)


def largest(difference: Tensor) -> float:
    """The largest absolute value: how far two tensors are apart at most, given their difference."""
    return float(difference.detach().abs().max())
