"""Figures of a run: loss curve, preference margins, rewards, attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError
from bardlet.run import fonts, metrics
from bardlet.runtime import atomic

TRAINING, VALIDATION, OLD = "#9db4c8", "#c0392b", "#2e7d5b"
"""The colors of curves and points."""
DOTS, MAX_PIXELS = 110, 100_000_000
"""Dots per inch of a figure, and pixels of the largest attention map: each takes four bytes of memory."""


def loss_curve(run: Path, title: str, label: str = "loss (nats per token)", bigram: float | None = None) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss over steps, with --replay on both texts.

    Args:
        run: the run folder.
        title: the title of the figure.
        label: the name of the loss, with its unit.
        bigram: the loss of a bigram in the same unit, drawn as a dashed line; None: no line.
    """
    lines = metrics.read_metrics(run)
    train, val, old = (_points(lines, name) for name in ("train_loss", "val_loss", "old_val_loss"))
    figure = _figure(7, 4)
    axes = figure.subplots()
    if train:
        _plot_training(axes, train, "training")
    if val:
        _plot_validation(axes, val, "validation")
        step, low = min(val, key=lambda point: point[1])
        axes.annotate(f"{low:.4f}", (step, low), xytext=(0, 8), textcoords="offset points", ha="center")
    if old:
        axes.plot(*zip(*old, strict=True), color=OLD, linewidth=1.5, marker="o", markersize=3,
                  label="validation, old text")
    if bigram is not None:
        axes.axhline(bigram, color="#999999", linewidth=1, linestyle="--", label="bigram")
    _finish(axes, xlabel="step", ylabel=label, title=title)
    figure.savefig(run / "loss.png")


def margins(run: Path, title: str, margins: Any, confidence: Any, accuracy: Any, counts: Any) -> None:
    """Draw margins.png: a histogram of the reward margins of held-out pairs, and a reward model's calibration.

    Args:
        run: the run folder.
        title: the title of the figure.
        margins: reward of the chosen completion minus that of the rejected one, for each pair: (N,).
        confidence, accuracy, counts: mean probability of the preferred completion, share of pairs ranked correctly, and
            number of pairs, for each bin: (K,).
    """
    figure = _figure(9, 4)
    left, right = figure.subplots(1, 2)
    left.hist(margins, bins=40, color=TRAINING)
    left.axvline(0, color=VALIDATION, linewidth=1)
    right.plot((0.5, 1), (0.5, 1), color="#999999", linewidth=1, linestyle="--", label="perfectly calibrated")
    right.scatter(confidence, accuracy, s=[10 + 200 * n / max(counts) for n in counts], color=VALIDATION, alpha=0.7)
    _finish(left, xlabel="reward of the chosen - of the rejected completion", ylabel="held-out pairs", title=title)
    _finish(right, xlabel="confidence (area: number of pairs)", ylabel="accuracy", xlim=(0.48, 1.02))
    figure.savefig(run / "margins.png")


def reward_curve(run: Path, title: str) -> None:
    """Draw loss.png of reinforcement learning: the mean reward, and the KL divergence from the reference model.

    Without rollouts in metrics.jsonl there is no KL, and only the panel of the rewards.
    """
    lines = metrics.read_metrics(run)
    reward, kl = _points(lines, "reward"), _points(lines, "kl")
    val = [(step, -loss) for step, loss in _points(lines, "val_loss")]
    panels = 2 if kl else 1
    figure = _figure(5 * panels, 4)
    axes = figure.subplots(1, panels, squeeze=False)
    if reward:
        _plot_training(axes[0, 0], reward, "rollouts")
    if val:
        _plot_validation(axes[0, 0], val, "held-out prompts")
    _finish(axes[0, 0], xlabel="step", ylabel="mean reward", title=title)
    if kl:
        _plot_training(axes[0, 1], kl)
        _finish(axes[0, 1], xlabel="step", ylabel="KL to the reference (nats per completion)")
    figure.savefig(run / "loss.png")


def attention_maps(path: Path, maps: Any, source: list[str], target: list[str]) -> None:
    """Draw cross-attention as a PNG: a panel for each layer and head, a row for each target token.

    Args:
        path: the PNG file.
        maps: attention weights (L, H, T, S); each row sums to 1.
        source, target: the S and T tokens as text.

    Raises:
        BardletError: the figure would be too large.
    """
    layers, heads, T, S = maps.shape
    size = (heads * (0.6 + 0.16 * S) + 1, layers * (0.7 + 0.16 * T) + 1)
    width, height = (DOTS * inches for inches in size)
    if max(width, height) >= 2**16 or width * height > MAX_PIXELS:
        raise BardletError(f"--attention {path}: {S} source and {T} target tokens in {layers} layers of {heads} heads "
                           f"need a picture of {width:,.0f} by {height:,.0f} pixels; shorten the first line")
    labels, families = fonts.drawable([printable_token(t) for t in (*source, *target)])
    columns, rows = labels[:S], labels[S:]
    figure = _figure(*size)
    grid = figure.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer][head]
            axes.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axes.set_xticks(range(S), columns, rotation=90, fontsize=6, fontfamily=families)
            axes.set_yticks(range(T), rows if head == 0 else [""] * T, fontsize=6, fontfamily=families)
    figure.supxlabel("source token (attended to)", fontsize=9)
    figure.supylabel("target token (generated)", fontsize=9)
    with atomic.explain_write_errors(path):
        figure.savefig(path)


def printable_token(text: str) -> str:
    """Return a token as a label: spaces visible, at most 16 characters."""
    return (text.strip("\n").replace(" ", "\u00b7") or "\u00b7")[:16]


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, its size in inches.

    It is made without pyplot: the machine may have no display, and a notebook's own figures use pyplot.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS, layout="constrained")


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line in which `name` is a finite number."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None and math.isfinite(line[name])]


def _plot_training(axes: Any, points: Sequence[tuple[int, float]], label: str | None = None) -> None:
    marker = "o" if len(points) == 1 else None  # a line through one point is invisible
    axes.plot(*zip(*points, strict=True), color=TRAINING, linewidth=1, marker=marker, markersize=3, label=label)


def _plot_validation(axes: Any, points: Sequence[tuple[int, float]], label: str) -> None:
    axes.plot(*zip(*points, strict=True), color=VALIDATION, linewidth=2, marker="o", markersize=3, label=label)


def _finish(axes: Any, **labels: Any) -> None:
    """Set the labels, grid and legend of a panel; say so in a panel that has no data."""
    if "title" in labels:
        [title], families = fonts.drawable([labels.pop("title")])
        axes.set_title(title, fontfamily=families)
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    elif not axes.has_data():
        axes.text(0.5, 0.5, "no data in metrics.jsonl", transform=axes.transAxes, ha="center")
