"""Figures of a run: loss curve, preference margins, rewards, attention maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bardlet.errors import BardletError
from bardlet.run import metrics
from bardlet.runtime import atomic


def loss_curve(run: Path, title: str, what: str = "loss (nats per token)") -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss over steps; what: the loss is called."""
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window: the machine may have no screen
    import matplotlib.pyplot as plt

    lines = metrics.read_metrics(run)
    train = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=110, layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db4c8", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c0392b", linewidth=2, marker="o", markersize=3, label="validation")
        step, low = min(val, key=lambda point: point[1])
        axes.annotate(f"{low:.4f}", (step, low), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="step", ylabel=what, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False)
    figure.savefig(run / "loss.png")
    plt.close(figure)


def margins(run: Path, title: str, margins: Any, sure: Any, right: Any, number: Any) -> None:
    """Draw margins.png: by how much more the chosen answers of held-out pairs got, and how far a reward model's
    certainty is to be trusted.

    Args:
        margins: (N,), one for each pair.
        sure, right, number: (K,): how sure it was, how often it was right, and of how many pairs, of each bin.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, axes) = plt.subplots(1, 2, figsize=(9, 4), dpi=110, layout="constrained")
    left.hist(margins, bins=40, color="#9db4c8")
    left.axvline(0, color="#c0392b", linewidth=1)
    left.set(xlabel="reward of the chosen answer - of the rejected one", ylabel="held-out pairs", title=title)
    axes.plot((0.5, 1), (0.5, 1), color="#999999", linewidth=1, linestyle="--", label="as sure as it should be")
    axes.scatter(sure, right, s=[10 + 200 * n / max(number) for n in number], color="#c0392b", alpha=0.7)
    axes.set(xlabel="how sure it is (area: how many pairs)", ylabel="how often it is right", xlim=(0.48, 1.02))
    axes.legend(frameon=False)
    for one in (left, axes):
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / "margins.png")
    plt.close(figure)


def reward_curve(run: Path, title: str) -> None:
    """Draw loss.png of a run that learned from rewards: the mean reward, and how far it went from where it began."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = metrics.read_metrics(run)
    train = [(line["step"], line["reward"], line["kl"]) for line in lines if "reward" in line]
    val = [(line["step"], -line["val_loss"]) for line in lines if "val_loss" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=110, layout="constrained")
    if train:
        steps, reward, kl = zip(*train, strict=True)
        left.plot(steps, reward, color="#9db4c8", linewidth=1, label="rollouts")
        right.plot(steps, kl, color="#9db4c8", linewidth=1)
    if val:
        left.plot(*zip(*val, strict=True), color="#c0392b", linewidth=2, marker="o", markersize=3, label="held out")
    left.set(xlabel="step", ylabel="mean reward", title=title)
    right.set(xlabel="step", ylabel="KL to the reference (nats of an answer)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(run / "loss.png")
    plt.close(figure)

DOTS, MOST_PIXELS = 110, 100_000_000
"""Dots per inch of the pictures of attention, and pixels of the largest: each takes four bytes while it is drawn."""


def attention_maps(path: Path, maps: Any, source: list[str], target: list[str]) -> None:
    """Draw cross-attention as a PNG: a panel for each layer and head, a row for each target token.

    Args:
        maps: (L, H, T, S), each row with the sum 1.
        source, target: the S and T tokens as text.

    Raises BardletError where the picture would be too large to be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, heads, T, S = maps.shape
    size = (heads * (0.6 + 0.16 * S) + 1, layers * (0.7 + 0.16 * T) + 1)
    width, height = (DOTS * inches for inches in size)
    if max(width, height) >= 2**16 or width * height > MOST_PIXELS:
        raise BardletError(f"--attention {path}: {S} source and {T} target tokens in {layers} layers of {heads} heads "
                           f"make a picture of {width:,.0f} by {height:,.0f} pixels; give a shorter first line")
    figure, grid = plt.subplots(layers, heads, figsize=size, dpi=DOTS, layout="constrained", squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer][head]
            axes.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axes.set_xticks(range(S), [printable_token(t) for t in source], rotation=90, fontsize=6)
            axes.set_yticks(range(T), [printable_token(t) for t in target] if head == 0 else [""] * T, fontsize=6)
    figure.supxlabel("source token that is looked at", fontsize=9)
    figure.supylabel("target token that is being written", fontsize=9)
    with atomic.explain_write_errors(path):
        figure.savefig(path)
    plt.close(figure)


def printable_token(text: str) -> str:
    """A token as a label: its spaces seen, and no sign that matplotlib takes for mathematics."""
    return (text.strip("\n").replace(" ", "\u00b7").replace("$", r"\$") or "\u00b7")[:16]
