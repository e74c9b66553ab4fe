"""The maths of the lecture as experiments: `bardlet ladder --explain` prints them, the course shows them.

    for experiment in run():
        print(text(experiment))

Each function of EXPERIMENTS computes real numbers with seeds of its own: it gives the same ones each time, and leaves
torch's global generator where it was.
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
"""Every experiment by its name, in the order of the lecture."""

WIDTH = 78
"""Columns of a terminal that `text` fills at most."""


def run(names: Iterable[str] | None = None) -> list[Experiment]:
    """Runs the experiments of these names, by default all, and gives back what came out, in the order asked for.

    Raises BardletError for a name that is none.
    """
    chosen = list(EXPERIMENTS) if names is None else list(names)
    for name in chosen:
        if name not in EXPERIMENTS:
            raise BardletError(f"'{name}' is no experiment; choose from {', '.join(EXPERIMENTS)}")
    return [EXPERIMENTS[name]() for name in chosen]


def text(experiment: Experiment) -> str:
    """An experiment for the terminal: title, question and findings, in at most 78 columns, no line break at the end."""
    parts = [experiment.title, "-" * len(experiment.title), *textwrap.wrap(experiment.question, WIDTH)]
    for line in experiment.lines:
        parts += textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(parts)


def pictures(folder: Path, experiments: Iterable[Experiment] | None = None) -> list[str]:
    """Draws the experiments (by default all of them, run for it) as folder/NAME.png and folder/NAME-dark.png.

    Gives back the names of those that have a picture.
    """
    drawn = []
    for experiment in run() if experiments is None else experiments:
        if experiment.paint is not None:
            drawing.draw(folder, experiment.name, experiment.paint)
            drawn.append(experiment.name)
    return drawn
