"""How the experiments are drawn: maps of matrices, curves, bars and histograms, side by side in one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bardlet.ladder.pictures import WIDTH, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = Callable[[Any, Palette], None]
"""Draws into matplotlib axes, in a palette's colours."""


def panels(*panels: Panel, columns: int = 2, height: float = 3.3) -> Callable[[Palette], Figure]:
    """A figure of panels in rows of `columns`, each row `height` inches high: a `paint` for `pictures.draw`."""

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        rows = math.ceil(len(panels) / columns)
        figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), layout="constrained", squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            panel(axes, palette)
        return figure

    return paint


def matrix(title: str, values: Tensor, around_zero: bool = False, most: float | None = None, rows: str = "position",
           columns: str = "looks at position", bar: bool = True) -> Panel:
    """A map of a matrix (R, C) of numbers. What is not finite stays empty.

    Colours run from 0 to `most`, or, `around_zero`, from -most to most; without `most` to the largest number.
    """

    def panel(axes: Any, palette: Palette) -> None:
        top = most or float(values[values.isfinite()].abs().max()) or 1.0
        image = axes.imshow(values.numpy(), cmap=palette.diverging if around_zero else palette.colormap,
                            vmin=-top if around_zero else 0, vmax=top)
        axes.set(title=title, xlabel=columns, ylabel=rows)
        axes.spines[["top", "right"]].set_visible(True)
        if bar:
            axes.figure.colorbar(image, ax=axes, shrink=0.75)

    return panel


def curves(title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
           scales: tuple[str, str] = ("linear", "linear"), expected: Sequence[str] = (), nested: bool = False) -> Panel:
    """Lines by their labels, each (xs, ys). Those in `expected` come from theory: thin and dashed, without marks.

    `nested`: each is thinner than the one before, so that lines upon each other are seen.
    """

    def panel(axes: Any, palette: Palette) -> None:
        colours = iter(palette.series)
        for i, (label, (xs, ys)) in enumerate(lines.items()):
            if label in expected:
                axes.plot(xs, ys, color=palette.foreground, linewidth=1.2, linestyle="--", label=label)
            else:
                width, mark = (max(7 - 2.8 * i, 1.4), "") if nested else (2, "o")
                axes.plot(xs, ys, color=next(colours), marker=mark, markersize=4, linewidth=width, label=label)
        axes.set(title=title, xlabel=x, ylabel=y, xscale=scales[0], yscale=scales[1])
        axes.grid(True)
        if nested:  # lines everywhere: the legend stands below
            axes.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.22))
        else:
            axes.legend(fontsize=10)

    return panel


def bars(title: str, groups: Mapping[str, Tensor], x: str, y: str) -> Panel:
    """Groups of bars beside each other by their labels, each (N,)."""

    def panel(axes: Any, palette: Palette) -> None:
        width = 0.8 / len(groups)
        for i, (label, heights) in enumerate(groups.items()):
            places = [n + (i - (len(groups) - 1) / 2) * width for n in range(len(heights))]
            axes.bar(places, heights.tolist(), width=width, color=palette.series[i], label=label)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(fontsize=10)

    return panel


def histogram(title: str, draws: Tensor, marks: Mapping[str, float], x: str, bins: int = 50) -> Panel:
    """How often which number was drawn, of draws (N,), with upright lines at `marks`, by their labels."""

    def panel(axes: Any, palette: Palette) -> None:
        axes.hist(draws.numpy(), bins=bins, color=palette.muted, alpha=0.5)
        for (label, place), colour, style in zip(marks.items(), palette.series, ("-", "--", ":"), strict=False):
            axes.axvline(place, color=colour, linestyle=style, label=label)
        axes.set(title=title, xlabel=x, yticks=[])
        axes.margins(y=0.35)  # room for the legend above
        axes.legend(fontsize=10, loc="upper right")

    return panel
