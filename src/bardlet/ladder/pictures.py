"""The ladder's pictures: loss curves, the bigram's table, position embeddings, attention maps.

Every picture is drawn twice, for light and dark pages, on a transparent background. The sizes suit a phone: 7 inches at
130 dpi, scaled down to 390 pixels, leave the text readable. Each function imports matplotlib itself, because that takes
longer than importing the rest of bardlet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bardlet.inference.generate import eval_mode
from bardlet.run import metrics
from bardlet.tokenizer.base import SEPARATOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bardlet.ladder.run import Outcome

WIDTH = 7.0
"""Width of every figure in inches."""
DPI = 130
MAX_BIGRAM_TOKENS = 65
"""Tokens in the bigram's picture if the vocabulary is large."""
MAX_MAP_LABELS = 16
"""Labels that fit along an attention map in a row of four."""
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
                  "Malgun Gothic", "Arial Unicode MS")
"""Fonts with characters that matplotlib's default font lacks; used if installed."""


@dataclass(frozen=True)
class Palette:
    """The colors of one theme, for matplotlib. Contrast is at least 3:1 for lines and 4.5:1 for text."""

    foreground: str
    """Text."""
    muted: str
    """Axes, grids (with an alpha) and reference data; also readable as text."""
    accent: str
    """The main line or bar."""
    second: str
    """A second line or bar next to it."""
    series: tuple[str, ...]
    """Eight colors for distinct lines; the first two are accent and second."""
    colormap: str
    """A sequential colormap; 0 is close to the page's background."""
    diverging: str
    """A diverging colormap; 0 is close to the page's background."""
    dark: bool


Paint = Callable[[Palette], "Figure"]
"""Draws a figure in the colors of a palette."""
LIGHT = Palette(
    foreground="#1f2328", muted="#5b6570", accent="#0b62c4", second="#c2410c",
    series=("#0b62c4", "#c2410c", "#15803d", "#a21caf", "#8a6100", "#0e7490", "#be123c", "#4b5563"),
    colormap="Blues", diverging="RdBu_r", dark=False)  # fmt: skip
DARK = Palette(
    foreground="#e6e9ee", muted="#9aa5b1", accent="#6cb6ff", second="#ffa657",
    series=("#6cb6ff", "#ffa657", "#7ee787", "#e6a0f0", "#e3c766", "#56d4dd", "#ff8a94", "#b1bac4"),
    colormap="magma", diverging="berlin", dark=True)  # fmt: skip


def draw(folder: Path, name: str, paint: Paint) -> None:
    """Write folder/NAME.png and folder/NAME-dark.png: the figure from `paint` in each palette.

    While `paint` runs, matplotlib's defaults use the palette's colors, a font size that suits a phone, and no top or
    right spine, so `paint` can create its figure with `plt.subplots(layout="constrained")`.
    """
    import matplotlib

    matplotlib.use("Agg")  # the machine may have no display
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for palette, suffix in ((LIGHT, ""), (DARK, "-dark")):
        with matplotlib.rc_context(_style(palette)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib draws a box instead
            figure = paint(palette)
            # no version in the file, so the same numbers give the same bytes
            figure.savefig(folder / f"{name}{suffix}.png", transparent=True, metadata={"Software": None})
            plt.close(figure)


def _style(palette: Palette) -> Any:
    """Return matplotlib's rcParams for a palette, based on its defaults: a user's matplotlibrc must not matter."""
    import matplotlib
    from cycler import cycler
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    ours = {
        "font.family": ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)],
        "figure.figsize": (WIDTH, 4.2), "figure.dpi": DPI, "savefig.dpi": DPI, "font.size": 12,
        "axes.titlesize": 13, "axes.prop_cycle": cycler(color=palette.series), "image.cmap": palette.colormap,
        "text.color": palette.foreground, "axes.labelcolor": palette.foreground,
        "axes.titlecolor": palette.foreground, "xtick.color": palette.muted, "ytick.color": palette.muted,
        "xtick.labelcolor": palette.foreground, "ytick.labelcolor": palette.foreground,
        "axes.edgecolor": palette.muted, "axes.spines.top": False, "axes.spines.right": False,
        "grid.color": palette.muted, "grid.alpha": 0.3, "legend.frameon": False, "lines.linewidth": 2,
        "figure.facecolor": "none", "axes.facecolor": "none",
    }  # fmt: skip
    return {**dict(matplotlib.rcParamsDefault), "backend": "agg", **ours}


# ---------------------------------------------------------------------------- loss curves


def loss_curves(outcomes: Sequence[Outcome]) -> Paint:
    """Draw the validation loss of every rung during training.

    Two panels: the small rungs over steps, and the scaled rungs, which have equal time but not equal steps, over
    seconds at the speed of the fastest seed, because other jobs may have slowed the others down. A line is the mean
    over seeds, and its band spans the lowest to the highest seed. The legend has the final losses on the whole
    validation split.
    """
    groups = [group for group in ([o for o in outcomes if not o.rung.scaled], [o for o in outcomes if o.rung.scaled])
              if group]

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, grid = plt.subplots(len(groups), figsize=(WIDTH, 4.9 * len(groups)), squeeze=False)
        figure.set_layout_engine("constrained", h_pad=0.12)
        for axes, group in zip(grid[:, 0], groups, strict=True):
            _loss_panel(axes, palette, group)
        return figure

    return paint


def _loss_panel(axes: Axes, palette: Palette, outcomes: Sequence[Outcome]) -> None:
    scaled = outcomes[0].rung.scaled
    rungs = sorted({o.rung.number: o.rung for o in outcomes}.items())
    highest = 0.0
    for k, (number, rung) in enumerate(rungs):
        seeds = [o for o in outcomes if o.rung.number == number]
        curves = [curve for o in seeds if len((curve := _loss_curve(o.folder))[0]) > 1]
        label = f"{number} {rung.name}: {np.mean([o.val_loss for o in seeds]):.3f}"
        color = palette.series[k % len(palette.series)]
        if not curves:
            axes.plot([], [], color=color, label=label)
            continue
        steps = curves[0][0]
        losses = np.array([np.interp(steps, *curve) for curve in curves])
        x = steps * min(o.seconds / o.steps for o in seeds) if scaled else steps
        axes.plot(x, losses.mean(0), color=color, label=label, linestyle=("-", "--", "-.", (0, (1, 1)))[k % 4])
        if len(curves) > 1:
            axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
        highest = max(highest, float(losses.mean(0)[len(x) // 5 :].max()))
    if highest:  # the high losses of the first steps would flatten the rest of the curves
        low = axes.dataLim.y0
        axes.set_ylim(low - 0.06 * (highest - low) - 0.01, highest + 0.35 * (highest - low) + 0.02)
    axes.set(xlabel="seconds of training" if scaled else "step", ylabel="validation loss (nats)")
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=2, fontsize=11.5, borderaxespad=0)


def _loss_curve(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (steps, validation losses) from a run folder's metrics.jsonl."""
    lines = metrics.read_metrics(folder)
    steps, loss = np.array([(line["step"], line["val_loss"]) for line in lines if "val_loss" in line],
                           dtype=np.float64).reshape(-1, 2).T  # fmt: skip
    return steps, loss


# ---------------------------------------------------------------------------- weights and attention


def bigram_table(probability_VV: Tensor, texts: Sequence[str]) -> Paint:
    """Draw the bigram's table after softmax: the probability of each token (columns) after each token (rows).

    If the vocabulary has more than 100 tokens, it shows the MAX_BIGRAM_TOKENS that the bigram generates most often.
    """
    selected = torch.arange(len(probability_VV))
    if len(selected) > 100:
        stationary_V = torch.full((len(selected),), 1.0 / len(selected))
        for _ in range(50):
            stationary_V = stationary_V @ probability_VV
        selected = stationary_V.topk(MAX_BIGRAM_TOKENS).indices.sort().values
    shown = probability_VV[selected][:, selected].numpy()
    names = [printable(texts[i]) for i in selected.tolist()]

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(WIDTH, WIDTH + 0.5), layout="constrained")
        # the square root keeps probabilities around 1 % visible
        image = axes.imshow(shown**0.5, vmin=0, vmax=1, interpolation="nearest")
        _name_ticks(axes, names, names, size=min(12.0, 0.75 * 72 * (WIDTH - 1) / len(names)))
        axes.set(xlabel="next", ylabel="current")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40,
                              label="probability of the next token")
        marks = {0.0: "0", 0.01: "1 %", 0.05: "5", 0.1: "10", 0.25: "25", 0.5: "50", 1.0: "100 %"}
        bar.set_ticks([p**0.5 for p in marks], labels=list(marks.values()))
        return figure

    return paint


def position_embeddings(table_TC: Tensor) -> Paint:
    """Draw the position embedding table, and the cosine similarity of each pair of its rows."""
    unit_TC = F.normalize(table_TC.float(), dim=1)
    cosine_TT = (unit_TC @ unit_TC.T).numpy()
    table, table_max = table_TC.float().numpy(), float(table_TC.abs().max()) or 1.0

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained")
        for axes, values, limit, title, label, unit in (
                (left, table, table_max, "table", "channel", "value"),
                (right, cosine_TT, 1.0, "similarity of two rows", "position", "cosine")):
            image = axes.imshow(values, aspect="auto", cmap=palette.diverging, vmin=-limit, vmax=limit,
                                interpolation="nearest")
            axes.set(title=title, xlabel=label, ylabel="position")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axes, location="bottom", aspect=25, label=unit)
        return figure

    return paint


@torch.no_grad()
def attention(model: nn.Module, idx_T: Tensor) -> list[tuple[str, Tensor]]:
    """Return the attention weights (H, T, T) of each attention layer, with the layer's name, in order.

    idx_T: token ids, int64; only the last block_size are used. Attention layers are the modules with a method
    `weights`; a forward hook captures their input. Single heads in a list `heads` are stacked. Rows are queries and
    sum to 1. Returns [] for a rung without attention.
    """
    inputs: dict[str, Tensor] = {}

    def capture(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        return hook

    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if callable(getattr(m, "weights", None))}
    hooks = [module.register_forward_pre_hook(capture(name)) for name, module in layers.items()]
    device = next(model.parameters()).device
    try:
        block_size: int = model.config.block_size  # type: ignore[union-attr, assignment]
        with eval_mode(model):
            model(idx_T[None, -block_size:].to(device))
        weights: dict[str, list[Tensor]] = {}
        for name, module in layers.items():
            weights.setdefault(name.rpartition(".heads.")[0] or name, []).append(module.weights(inputs[name])[0].cpu())
    finally:
        for handle in hooks:
            handle.remove()
    return [(name, heads[0] if heads[0].dim() == 3 else torch.stack(heads)) for name, heads in weights.items()]


def attention_maps(maps: Sequence[tuple[str, Tensor]], texts: Sequence[str]) -> Paint:
    """Draw the result of `attention`: a row of maps per layer, one map per head. `texts` are the T tokens' texts.

    The rows of a map are queries and the columns are keys. Masked entries stay empty.
    """
    columns, rows, T = max(len(m) for _, m in maps), len(maps), len(texts)
    names = [printable(text) for text in texts]
    future = np.triu(np.ones((T, T), bool), 1)

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        side = (WIDTH - 0.8) / max(columns, 2)  # a single map should not fill the page
        figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, rows * (side + 0.6) + 0.9), layout="constrained",
                                    squeeze=False)
        size = min(11.0, 0.85 * 72 * (side - 0.35) / T)
        for layer, (_, weights_HTT) in enumerate(maps):
            for head in range(columns):
                axes = grid[layer, head]
                if head >= len(weights_HTT):
                    axes.axis("off")
                    continue
                values = np.ma.masked_array(weights_HTT[head].float().numpy(), future)
                image = axes.imshow(values, vmin=0, vmax=1, interpolation="nearest")
                _name_ticks(axes, names, names if head == 0 else [], size)
                title = f"head {head + 1}" if rows == 1 else f"block {layer + 1}, head {head + 1}"
                axes.set_title(title if columns > 1 else "", fontsize=11 if columns <= 4 else 8)
        bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.6, aspect=40, fraction=0.05)
        bar.set_label("weight")
        return figure

    return paint


def last_row_of_attention(maps: Sequence[tuple[str, Tensor]], texts: Sequence[str]) -> Paint:
    """Draw the last token's attention weights: the last row of every map, one line per head, with room for labels."""
    rows = torch.cat([weights_HTT[:, -1] for _, weights_HTT in maps]).float().numpy()
    names = [printable(text) for text in texts]
    heads = [f"{layer + 1}.{head + 1}" for layer, (_, weights) in enumerate(maps) for head in range(len(weights))]

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.17 * len(rows)), layout="constrained")
        image = axes.imshow(rows, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        _name_ticks(axes, names, heads, size=min(10.0, 0.85 * 72 * (WIDTH - 1) / len(names)))
        axes.yaxis.set_tick_params(labelsize=9)
        axes.set(ylabel="block.head")
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, label="weight")
        return figure

    return paint


# ---------------------------------------------------------------------------- translation


def masks(source: int, target: int) -> Paint:
    """Draw the attention masks of the three translation models: rows attend to columns. Sizes are token counts."""
    both = source + target
    causal = np.tril(np.ones((both, both)))
    prefix = np.maximum(causal, np.arange(both) < source)
    encdec = np.full((both, both), np.nan)
    encdec[:source, :source] = 1  # the encoder
    encdec[source:, source:] = np.tril(np.ones((target, target)))
    encdec[source:, :source] = 2  # cross-attention

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap

        figure, row = plt.subplots(1, 3, figsize=(WIDTH, 3.4), layout="constrained")
        colors = ListedColormap(["none", palette.accent, palette.second])
        names = ("decoder only", "decoder only, prefix", "encoder-decoder")
        for axes, name, mask in zip(row, names, (causal, prefix, encdec), strict=True):
            axes.imshow(mask, cmap=colors, vmin=0, vmax=2)
            axes.set_title(name, fontsize=11.5)
            axes.set(xticks=[source / 2 - 0.5, source + target / 2 - 0.5], xticklabels=["source", "target"])
            axes.set(yticks=[source / 2 - 0.5, source + target / 2 - 0.5], yticklabels=["source", "target"])
            axes.tick_params(length=0, labelsize=11)
            axes.tick_params(axis="y", labelrotation=90)
            for i in range(1, both):
                for line in (axes.axhline, axes.axvline):
                    line(i - 0.5, color=palette.muted, linewidth=1.8 if i == source else 0.4)
            axes.spines[["top", "right"]].set_visible(True)
        return figure

    return paint


def cross_attention(maps_LTS: Tensor, source: Sequence[str], target: Sequence[str]) -> Paint:
    """Draw the cross-attention of a translation: a panel per layer, a row per target token."""
    shown = maps_LTS.numpy()

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        height = 1.2 + 0.27 * len(target)
        figure, column = plt.subplots(len(shown), figsize=(WIDTH, height * len(shown)), squeeze=False)
        figure.set_layout_engine("constrained", h_pad=0.1)
        for layer, axes in enumerate(column[:, 0]):
            axes.imshow(shown[layer], vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {layer + 1}, mean over heads", fontsize=12)
            _name_ticks(axes, [printable(t) for t in source], [printable(t) for t in target], 11)
        return figure

    return paint


# ---------------------------------------------------------------------------- labels


def printable(text: str) -> str:
    """Return a token's text as a label: whitespace becomes visible symbols, `<|endoftext|>` the word "end"."""
    if text == SEPARATOR:
        return "end"
    symbols = {"\n": "↵", " ": "␣", "\t": "⇥", "\r": "←"}
    return "".join(symbols.get(c, c if c.isprintable() else "·") for c in text) or "·"


def _name_ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str], size: float) -> None:
    """Label both axes with token texts, unless the labels would be too small to read."""
    if size < 4.5:
        columns, rows = [], []
    long = max(map(len, columns), default=0) > 2  # BPE tokens: too long to print side by side
    for axis, names, rotation in ((axes.xaxis, columns, 90 if long else 0), (axes.yaxis, rows, 0)):
        short = [name if len(name) <= 8 else f"{name[:7]}…" for name in names]
        # a dollar sign does not start a formula here
        axis.set_ticks(range(len(names)), labels=short, fontsize=size, rotation=rotation, parse_math=False)
        axis.set_tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
