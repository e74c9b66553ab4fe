"""Panels of the experiments' figures: matrix maps, curves, bars and histograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bardlet.ladder.pictures import WIDTH, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = Callable[[Any, Palette], None]
"""Draws into matplotlib axes, in a palette's colors."""


def panels(*panels: Panel, columns: int = 2, height: float = 3.3) -> Callable[[Palette], Figure]:
    """Return a `paint` for `pictures.draw` that arranges panels in rows of `columns`, each `height` inches high."""

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        rows = math.ceil(len(panels) / columns)
        figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), layout="constrained", squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            panel(axes, palette)
        return figure

    return paint


def matrix(title: str, values: Tensor, around_zero: bool = False, vmax: float | None = None, rows: str = "position",
           columns: str = "attends to position", bar: bool = True) -> Panel:
    """Return a panel that maps a matrix (R, C) to colors. Entries that are not finite stay empty.

    The color scale runs from 0 to `vmax`, or from -vmax to vmax if `around_zero`; vmax defaults to the largest
    absolute value.
    """

    def panel(axes: Any, palette: Palette) -> None:
        top = vmax or float(values[values.isfinite()].abs().max()) or 1.0
        image = axes.imshow(values.numpy(), cmap=palette.diverging if around_zero else palette.colormap,
                            vmin=-top if around_zero else 0, vmax=top)
        axes.set(title=title, xlabel=columns, ylabel=rows)
        axes.spines[["top", "right"]].set_visible(True)
        if bar:
            axes.figure.colorbar(image, ax=axes, shrink=0.75)

    return panel


def curves(title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
           scales: tuple[str, str] = ("linear", "linear"), expected: Sequence[str] = (), nested: bool = False) -> Panel:
    """Return a panel of curves (xs, ys) by label. Labels in `expected` are theory: thin, without markers,
    the first dashed and the next dotted.

    `nested` makes each line thinner than the line before, so that coinciding lines stay visible.
    """

    def panel(axes: Any, palette: Palette) -> None:
        colors = iter(palette.series)
        for i, (label, (xs, ys)) in enumerate(lines.items()):
            if label in expected:
                style = ("--", ":")[expected.index(label) % 2]
                axes.plot(xs, ys, color=palette.foreground, linewidth=1.4, linestyle=style, label=label)
            else:
                width, marker = (max(7 - 2.8 * i, 1.4), "") if nested else (2, "o")
                axes.plot(xs, ys, color=next(colors), marker=marker, markersize=4, linewidth=width, label=label)
        axes.set(title=title, xlabel=x, ylabel=y, xscale=scales[0], yscale=scales[1])
        axes.grid(True)
        if nested:  # the lines leave no room inside the axes: put the legend below
            axes.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.22))
        else:
            axes.legend(fontsize=10)

    return panel


def bars(title: str, groups: Mapping[str, Tensor], x: str, y: str) -> Panel:
    """Return a panel of grouped bars: for each label its heights (N,)."""

    def panel(axes: Any, palette: Palette) -> None:
        width = 0.8 / len(groups)
        for i, (label, heights) in enumerate(groups.items()):
            positions = [n + (i - (len(groups) - 1) / 2) * width for n in range(len(heights))]
            axes.bar(positions, heights.tolist(), width=width, color=palette.series[i], label=label)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(fontsize=10)

    return panel


def histogram(title: str, samples: Tensor, marks: Mapping[str, float], x: str, bins: int = 50) -> Panel:
    """Return a panel with the histogram of samples (N,) and labeled vertical lines at `marks`."""

    def panel(axes: Any, palette: Palette) -> None:
        axes.hist(samples.numpy(), bins=bins, color=palette.muted, alpha=0.5)
        for (label, position), color, style in zip(marks.items(), palette.series, ("-", "--", ":"), strict=False):
            axes.axvline(position, color=color, linestyle=style, label=label)
        axes.set(title=title, xlabel=x, yticks=[])
        axes.margins(y=0.35)  # leave room for the legend
        axes.legend(fontsize=10, loc="upper right")

    return panel
