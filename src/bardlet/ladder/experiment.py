"""The Experiment class: a question, the figures that answer it, and a picture.

`experiments_attention.py` and `experiments_training.py` define the experiments; `experiments.py` runs them.
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
"""The lecture's small model: a vocabulary of 65 characters and the sizes of the small rungs."""


@dataclass(frozen=True)
class Experiment:
    """The result of one experiment. Its sentences contain no literal numbers: each number comes from `figures`."""

    name: str
    title: str
    question: str
    """One sentence."""
    conclusion: tuple[str, ...]
    """The results, as format strings over the figures: "the variance is {variance:.2f}"."""
    figures: Mapping[str, float]
    """Every computed number, by name."""
    paint: Callable[[Palette], Figure] | None = None
    """The picture, for `pictures.draw`."""

    @property
    def lines(self) -> list[str]:
        """The conclusion with its numbers filled in, as plain text: one or two sentences per line."""
        return [sentence.format_map(self.figures) for sentence in self.conclusion]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and restore its state afterwards.

    PyTorch's layers draw their initial weights from it, and dropout its masks. Everything else in an experiment uses
    its own generator.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # the CPU generator only: torch.manual_seed would also reseed a GPU's
    try:
        yield
    finally:
        torch.set_rng_state(before)


def max_abs(values: Tensor) -> float:
    """Return the largest absolute value; of a difference, how far apart two tensors are at most."""
    return float(values.detach().abs().max())
