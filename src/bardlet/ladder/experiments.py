"""The math of the lecture as experiments. `bardlet ladder --explain` prints them; the course shows them.

    for experiment in run():
        print(text(experiment))

Each function in EXPERIMENTS computes its numbers from fixed seeds: they are the same on every call, and torch's global
generator is left untouched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from bardlet.errors import BardletError
from bardlet.ladder import pictures as drawing
from bardlet.ladder.experiment import Experiment
from bardlet.ladder.experiments_attention import (
    averages,
    heads,
    mask,
    masks,
    rotary_positions,
    variance,
)
from bardlet.ladder.experiments_training import dropout, first_loss, layernorm, residual_gradients

EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "first_loss": first_loss,
    "averages": averages,
    "mask": mask,
    "variance": variance,
    "masks": masks,
    "heads": heads,
    "residual": residual_gradients,
    "layernorm": layernorm,
    "dropout": dropout,
    "rotary": rotary_positions,
}
"""The experiments by name, in the lecture's order."""

WIDTH = 78
"""Maximum line width of `text`, in columns."""

INTRODUCTION = textwrap.fill(
    "The lecture's math as small experiments, computed now from fixed seeds. Losses are in nats. The course shows them "
    "with figures: run `make docs` and open site/maths.html. `bardlet ladder --explain --out DIR` saves the figures.",
    WIDTH)
"""Text above the experiments in a terminal."""


def run(names: Iterable[str] | None = None) -> list[Experiment]:
    """Run the named experiments (default: all) and return their results in the same order.

    Raises BardletError for an unknown name.
    """
    selected = list(EXPERIMENTS) if names is None else list(names)
    for name in selected:
        if name not in EXPERIMENTS:
            raise BardletError(f"unknown experiment '{name}'; choose from {', '.join(EXPERIMENTS)}")
    return [EXPERIMENTS[name]() for name in selected]


def text(experiment: Experiment) -> str:
    """Format an experiment for a terminal: title, question and results, at most 78 columns, no trailing newline."""
    parts = [experiment.title, "-" * len(experiment.title), *textwrap.wrap(experiment.question, WIDTH)]
    for line in experiment.lines:
        parts += textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(parts)


def pictures(folder: Path, experiments: Iterable[Experiment] | None = None) -> list[str]:
    """Draw the experiments (default: run all) as folder/NAME.png and folder/NAME-dark.png.

    Returns the names of the experiments that have a picture.
    """
    drawn = []
    for experiment in run() if experiments is None else experiments:
        if experiment.paint is not None:
            drawing.draw(folder, experiment.name, experiment.paint)
            drawn.append(experiment.name)
    return drawn
