"""The ladder's pictures: loss curves, the bigram's table, position embeddings, attention maps.

Every picture is drawn twice, for light and for dark pages, on a transparent ground. Sizes are chosen for a phone: 7
inches at 130 dpi shrink to 390 pixels with letters that can still be read. matplotlib is imported inside the functions:
it takes longer to start than the rest of bardlet.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bardlet.ladder.run import Outcome

WIDTH = 7.0
"""Inches: how wide every figure is."""
DPI = 130
MOST = 65
"""How many tokens the bigram's picture shows of a large vocabulary."""
NAMED = 16
"""Up to how many letters fit along a map in a row of four."""
FALLBACK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic",
            "Arial Unicode MS")
"""Fonts with characters that matplotlib's own has not, tried where they are installed."""


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, as matplotlib takes them. Lines and letters stand out at least 3:1 and 4.5:1."""

    foreground: str
    """Letters."""
    muted: str
    """Axes, grids (with an alpha), and what is only there to compare with; readable as letters, too."""
    accent: str
    """The line or bar that it is about."""
    second: str
    """The one beside it."""
    series: tuple[str, ...]
    """Eight colours for lines that are told apart; the first two are accent and second."""
    colormap: str
    """The name of a colormap from nothing (like the page) to much."""
    diverging: str
    """The name of a colormap for numbers around 0, which looks like the page."""
    dark: bool


Paint = Callable[[Palette], "Figure"]
"""Makes a figure in the colours of a palette."""
LIGHT = Palette(
    foreground="#1f2328", muted="#5b6570", accent="#0b62c4", second="#c2410c",
    series=("#0b62c4", "#c2410c", "#15803d", "#a21caf", "#8a6100", "#0e7490", "#be123c", "#4b5563"),
    colormap="Blues", diverging="RdBu_r", dark=False)  # fmt: skip
DARK = Palette(
    foreground="#e6e9ee", muted="#9aa5b1", accent="#6cb6ff", second="#ffa657",
    series=("#6cb6ff", "#ffa657", "#7ee787", "#e6a0f0", "#e3c766", "#56d4dd", "#ff8a94", "#b1bac4"),
    colormap="magma", diverging="berlin", dark=True)  # fmt: skip


def draw(folder: Path, name: str, paint: Paint) -> None:
    """Write folder/NAME.png and folder/NAME-dark.png: what `paint` gives for each palette.

    While `paint` runs, matplotlib's defaults are in the palette's colours, letters are large enough for a phone, and
    there is no frame above and to the right: `paint` may make its figure by `plt.subplots(layout="constrained")`.
    """
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window: the machine may have no screen
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for palette, suffix in ((LIGHT, ""), (DARK, "-dark")):
        with matplotlib.rc_context(_style(palette)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box then stands for the character
            figure = paint(palette)
            # no version in the file: the same numbers give the same bytes
            figure.savefig(folder / f"{name}{suffix}.png", transparent=True, metadata={"Software": None})
            plt.close(figure)


def _style(palette: Palette) -> Any:
    """matplotlib's settings for a palette, upon its own defaults (a user's matplotlibrc would change the pictures)."""
    import matplotlib
    from cycler import cycler
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    ours = {
        "font.family": ["DejaVu Sans", *(name for name in FALLBACK if name in installed)],
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
    """The validation loss of every rung while it trains.

    Two panels, because no axis suits all: the small rungs over steps, the scaled ones, which have the same time and
    not the same steps, over seconds at the pace of the fastest seed: another may have had company on the machine.
    A line is the mean over seeds, its band their lowest and highest.
    The legend tells what each came to, over the whole validation part.
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
    if highest:  # the first steps fall from far above: they would press all the rest flat
        low = axes.dataLim.y0
        axes.set_ylim(low - 0.06 * (highest - low) - 0.01, highest + 0.35 * (highest - low) + 0.02)
    axes.set(xlabel="seconds of training" if scaled else "step", ylabel="validation loss (nats)")
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=2, fontsize=11.5, borderaxespad=0)


def _loss_curve(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, validation losses) of a run folder's metrics.jsonl."""
    lines = metrics.read_metrics(folder)
    steps, loss = np.array([(line["step"], line["val_loss"]) for line in lines if "val_loss" in line],
                           dtype=np.float64).reshape(-1, 2).T  # fmt: skip
    return steps, loss


# ---------------------------------------------------------------------------- what a model has learned


def bigram_table(probability_VV: Tensor, letters: Sequence[str]) -> Paint:
    """How likely each token (columns) is after each (rows): the table of the bigram after softmax.

    Of a vocabulary beyond 100 it shows the MOST tokens that the table itself writes most often in the long run.
    """
    chosen = torch.arange(len(probability_VV))
    if len(chosen) > 100:
        often_V = torch.full((len(chosen),), 1.0 / len(chosen))
        for _ in range(50):
            often_V = often_V @ probability_VV
        chosen = often_V.topk(MOST).indices.sort().values
    shown = probability_VV[chosen][:, chosen].numpy()
    names = [printable(letters[i]) for i in chosen.tolist()]

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(WIDTH, WIDTH + 0.5), layout="constrained")
        # the square root shows what is likely once in a hundred, too
        image = axes.imshow(shown**0.5, vmin=0, vmax=1, interpolation="nearest")
        _name_ticks(axes, names, names, size=min(12.0, 0.75 * 72 * (WIDTH - 1) / len(names)))
        axes.set(xlabel="next", ylabel="current")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, label="probability of the next")
        marks = {0.0: "0", 0.01: "1 %", 0.05: "5", 0.1: "10", 0.25: "25", 0.5: "50", 1.0: "100 %"}
        bar.set_ticks([p**0.5 for p in marks], labels=list(marks.values()))
        return figure

    return paint


def position_embeddings(table_TC: Tensor) -> Paint:
    """The table of positions as it is, and how alike each two positions are (the cosine of their rows)."""
    unit_TC = F.normalize(table_TC.float(), dim=1)
    alike_TT = (unit_TC @ unit_TC.T).numpy()
    table, far = table_TC.float().numpy(), float(table_TC.abs().max()) or 1.0

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained")
        for axes, values, limit, title, label in ((left, table, far, "the table", "channel"),
                                                  (right, alike_TT, 1.0, "alike (cosine)", "position")):
            image = axes.imshow(values, aspect="auto", cmap=palette.diverging, vmin=-limit, vmax=limit,
                                interpolation="nearest")
            axes.set(title=title, xlabel=label, ylabel="position")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axes, location="bottom", aspect=25)
        return figure

    return paint


@torch.no_grad()
def attention(model: nn.Module, idx_T: Tensor) -> list[tuple[str, Tensor]]:
    """Who looks at whom: the weights (H, T, T) of each attention layer, named as in the model, in order.

    idx_T: token ids, int64; at most block_size of them are used, the last ones. Asked for are the modules that have
    a method `weights`: its input is caught on its way through the model. Single heads in a list `heads` are stacked.
    Rows are queries and add up to 1. A rung without attention gives [].
    """
    inputs: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs[name] = given[0]

        return hook

    attending: dict[str, Any] = {n: m for n, m in model.named_modules() if callable(getattr(m, "weights", None))}
    hooks = [module.register_forward_pre_hook(catch(name)) for name, module in attending.items()]
    device = next(model.parameters()).device
    try:
        block_size: int = model.config.block_size  # type: ignore[union-attr, assignment]
        with eval_mode(model):
            model(idx_T[None, -block_size:].to(device))
        layers: dict[str, list[Tensor]] = {}
        for name, module in attending.items():
            layers.setdefault(name.rpartition(".heads.")[0] or name, []).append(module.weights(inputs[name])[0].cpu())
    finally:
        for handle in hooks:
            handle.remove()
    return [(name, heads[0] if heads[0].dim() == 3 else torch.stack(heads)) for name, heads in layers.items()]


def attention_maps(maps: Sequence[tuple[str, Tensor]], letters: Sequence[str]) -> Paint:
    """What `attention` gave, a row of pictures for each layer, one for each head; `letters` are the T tokens' texts.

    A row of a map is a token that looks, a column one that is looked at. What may not be seen stays empty.
    """
    across, down, T = max(len(m) for _, m in maps), len(maps), len(letters)
    names = [printable(letter) for letter in letters]
    future = np.triu(np.ones((T, T), bool), 1)

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        side = (WIDTH - 0.8) / max(across, 2)  # one map alone is not to be as large as a page
        figure, grid = plt.subplots(down, across, figsize=(WIDTH, down * (side + 0.6) + 0.9), layout="constrained",
                                    squeeze=False)
        size = min(11.0, 0.85 * 72 * (side - 0.35) / T)
        for layer, (_, weights_HTT) in enumerate(maps):
            for head in range(across):
                axes = grid[layer, head]
                if head >= len(weights_HTT):
                    axes.axis("off")
                    continue
                values = np.ma.masked_array(weights_HTT[head].float().numpy(), future)
                image = axes.imshow(values, vmin=0, vmax=1, interpolation="nearest")
                _name_ticks(axes, names, names if head == 0 else [], size)
                title = f"head {head + 1}" if down == 1 else f"block {layer + 1}, head {head + 1}"
                axes.set_title(title if across > 1 else "", fontsize=11 if across <= 4 else 8)
        bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.6, aspect=40, fraction=0.05)
        bar.set_label("weight")
        return figure

    return paint


def last_row_of_attention(maps: Sequence[tuple[str, Tensor]], letters: Sequence[str]) -> Paint:
    """What the last token takes from each: the last row of every map, a line for each head, with room for letters."""
    rows = torch.cat([weights_HTT[:, -1] for _, weights_HTT in maps]).float().numpy()
    names = [printable(letter) for letter in letters]
    heads = [f"{layer + 1}.{head + 1}" for layer, (_, weights) in enumerate(maps) for head in range(len(weights))]

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.17 * len(rows)), layout="constrained")
        image = axes.imshow(rows, vmin=0, vmax=max(0.25, rows.max()), aspect="auto", interpolation="nearest")
        _name_ticks(axes, names, heads, size=min(10.0, 0.85 * 72 * (WIDTH - 1) / len(names)))
        axes.yaxis.set_tick_params(labelsize=9)
        axes.set(ylabel="block.head")
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, label="weight")
        return figure

    return paint


# ---------------------------------------------------------------------------- letters


def masks(source: int, target: int) -> Paint:
    """Who sees whom, in the three models that translate: rows look at columns. Sizes are numbers of tokens."""
    both = source + target
    causal = np.tril(np.ones((both, both)))
    prefix = np.maximum(causal, np.arange(both) < source)
    apart = np.full((both, both), np.nan)
    apart[:source, :source] = 1  # the encoder
    apart[source:, source:] = np.tril(np.ones((target, target)))
    apart[source:, :source] = 2  # cross-attention

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap

        figure, row = plt.subplots(1, 3, figsize=(WIDTH, 3.4), layout="constrained")
        colours = ListedColormap(["none", palette.accent, palette.second])
        names = ("decoder only", "decoder only, prefix", "encoder-decoder")
        for axes, name, mask in zip(row, names, (causal, prefix, apart), strict=True):
            axes.imshow(mask, cmap=colours, vmin=0, vmax=2)
            axes.set_title(name, fontsize=11.5)
            axes.set(xticks=[source / 2 - 0.5, source + target / 2 - 0.5], xticklabels=["source", "target"])
            axes.set(yticks=[source / 2 - 0.5, source + target / 2 - 0.5], yticklabels=["source", "target"])
            axes.tick_params(length=0, labelsize=11)
            axes.tick_params(axis="y", labelrotation=90)
            for place in range(1, both):
                for line in (axes.axhline, axes.axvline):
                    line(place - 0.5, color=palette.muted, linewidth=1.8 if place == source else 0.4)
            axes.spines[["top", "right"]].set_visible(True)
        return figure

    return paint


def cross_attention(maps_LTS: Tensor, source: Sequence[str], target: Sequence[str]) -> Paint:
    """Where a translation looked: a panel for each layer, a row for each token of the target."""
    shown = maps_LTS.numpy()

    def paint(palette: Palette) -> Figure:
        import matplotlib.pyplot as plt

        tall = 1.2 + 0.27 * len(target)
        figure, column = plt.subplots(len(shown), figsize=(WIDTH, tall * len(shown)), squeeze=False)
        figure.set_layout_engine("constrained", h_pad=0.1)
        for layer, axes in enumerate(column[:, 0]):
            axes.imshow(shown[layer], vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {layer + 1}, mean of its heads", fontsize=12)
            _name_ticks(axes, [printable(t) for t in source], [printable(t) for t in target], 11)
        return figure

    return paint


def printable(text: str) -> str:
    """A token's text as a label: white space and control characters become signs that can be seen."""
    signs = {"\n": "↵", " ": "␣", "\t": "⇥", "\r": "←"}
    return "".join(signs.get(c, c if c.isprintable() else "·") for c in text) or "·"


def _name_ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str], size: float) -> None:
    """Letters along both axes; none where they would be smaller than can be read, even enlarged."""
    if size < 4.5:
        columns, rows = [], []
    words = max(map(len, columns), default=0) > 2  # tokens of a BPE: too long to stand side by side
    for axis, names, turn in ((axes.xaxis, columns, 90 if words else 0), (axes.yaxis, rows, 0)):
        short = [name if len(name) <= 8 else f"{name[:7]}…" for name in names]
        # a dollar sign is a letter here, not the start of a formula
        axis.set_ticks(range(len(names)), labels=short, fontsize=size, rotation=turn, parse_math=False)
        axis.set_tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
