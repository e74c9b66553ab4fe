"""Experiments on what makes a deep network trainable: residual connections, dropout, norms, the first loss.

Each function is one experiment, from its tensors to what came out. B rows, T positions, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.experiment import SMALL, Experiment, largest, seeded
from bardlet.ladder.experiments_paint import curves, histogram, matrix, panels
from bardlet.models.layers import RMSNorm
from bardlet.models.lecture import (
    BigramModel,
    DropoutModel,
    FeedForward,
    LayerNormBlock,
    LayerNormModel,
    ResidualBlock,
)


def residual_gradients() -> Experiment:
    """How much gradient reaches the input of each of 24 untrained blocks, with and without a straight way back."""
    depth = 24
    dice = torch.Generator().manual_seed(4)
    x = torch.randn(32, 8, 32, generator=dice, dtype=torch.float64)  # (B, T, C): what the embeddings give
    direction = torch.randn(32, 8, 32, generator=dice, dtype=torch.float64)
    direction = direction / direction.norm()  # the gradient that comes back from the loss, of norm 1
    with seeded(4):
        # float64: without residual connections the squares of these numbers are too small for float32
        blocks = nn.ModuleList(ResidualBlock(SMALL) for _ in range(depth)).double()
        normed = nn.ModuleList(LayerNormBlock(SMALL) for _ in range(depth)).double()

    def norms(steps: nn.ModuleList, straight: bool) -> list[float]:
        """The gradient's norm at the input of each block, and behind the last."""
        stream = [x.clone().requires_grad_()]
        for block in steps:
            h = stream[-1]
            stream.append(block(h) if straight else block.ffwd(block.sa(h)))  # type: ignore[operator]
        loss = (stream[-1] * direction).sum()
        return [float(gradient.norm()) for gradient in torch.autograd.grad(loss, stream)]

    stacks = {"residual": (blocks, True), "plain": (blocks, False), "norm": (normed, True)}
    found = {name: norms(stack, straight) for name, (stack, straight) in stacks.items()}
    figures: dict[str, float] = {"depth": depth, "shallow": SMALL.n_layer}
    for name, (stack, straight) in stacks.items():
        few = norms(stack[: SMALL.n_layer], straight)
        figures[name] = found[name][0] / found[name][-2]  # the first block's input against the last one's
        figures[f"{name}_shallow"] = few[0] / few[-2]
    places = range(depth + 1)
    return Experiment(
        "residual",
        "Residual connections carry the gradient",
        "How much of the gradient reaches the first of many untrained blocks?",
        ("Of {depth:.0f} blocks without residual connections the first gets {plain:.1e} times the gradient of the "
         "last: nothing arrives that could teach it.",
         "With residual connections the first gets {residual:.2f} times the gradient of the last, since each block on "
         "the way back adds its own share; with LayerNorm before each part as well, {norm:.2f} times.",
         "Of {shallow:.0f} blocks, as in the lecture, first against last: {plain_shallow:.1e} times without, "
         "{residual_shallow:.2f} with residual connections, {norm_shallow:.2f} with LayerNorm as well."),
        figures,
        panels(
            curves("gradient in a stack of untrained blocks", {
                "residual connections": (places, found["residual"]), "without": (places, found["plain"]),
                "residual and LayerNorm": (places, found["norm"])},
                "blocks passed", "norm of the gradient", ("linear", "log")), columns=1, height=4.2),
    )


def dropout() -> Experiment:
    """Zeros in training, made good by larger numbers, so that the mean is what eval computes."""
    p, draws = 0.2, 20_000
    dice = torch.Generator().manual_seed(5)
    x = torch.randn(1, 32, generator=dice)  # (1, C)
    idx = torch.randint(65, (4, 8), generator=dice)
    with seeded(5), torch.no_grad():
        drop, linear, nonlinear = nn.Dropout(p), nn.Linear(32, 32), FeedForward(SMALL)  # the last ends in a ReLU
        ones = drop(torch.ones(1_000_000))
        many = drop(x.expand(draws, 32))  # the same row, dropped in `draws` ways
        sums, relus = linear(many), nonlinear(many)  # (draws, C)
        straight, bent = linear(drop.eval()(x)), nonlinear(drop.eval()(x))  # in eval dropout does nothing
        model = DropoutModel(replace(SMALL, dropout=p))
        in_train = largest(model.train()(idx) - model(idx))
        in_eval = largest(model.eval()(idx) - model(idx))

    def off(values: Tensor, expected: Tensor) -> Tensor:
        """How many standard errors the means of `values` (draws, C) are from `expected`: (C)."""
        error = values.std(dim=0) / math.sqrt(draws)
        return (values.mean(dim=0) - expected[0]) / error.clamp_min(1e-9)

    at = int((relus.mean(0) - bent[0]).abs().argmax())  # the unit whose mean is furthest from eval
    marks = [{"eval": float(once[0, at]), "mean": float(values[:, at].mean())}
             for values, once in ((sums, straight), (relus, bent))]
    return Experiment(
        "dropout",
        "Dropout in training and after it",
        "What does dropout change, and why does eval need no correction?",
        ("Of {numbers:,.0f} ones dropout at {p:.1f} makes a share of {zeros:.4f} zero, the others {kept:.2f} = "
         "{one:.0f} / ({one:.0f} - {p:.1f}): the mean stays {mean:.4f}.",
         "A linear layer behind it: the mean over {draws:,.0f} draws is at most {linear:.1f} standard errors from "
         "what eval computes, over {units:.0f} units: chance.",
         "With a ReLU behind the layer it is not only chance: up to {nonlinear:.0f} standard errors. The means differ "
         "from eval by {gap:.3f} in the mean, where the outputs are {size:.3f}: near, not equal.",
         "Two passes of a model differ by up to {train:.3f} in training, by {eval:.1f} in eval."),
        {"p": p, "numbers": ones.numel(), "zeros": float((ones == 0).float().mean()), "kept": float(ones.max()),
         "one": 1, "mean": float(ones.mean()), "draws": draws, "units": 32, "linear": largest(off(sums, straight)),
         "nonlinear": largest(off(relus, bent)), "gap": float((relus.mean(0) - bent[0]).abs().mean()),
         "size": float(bent.mean()), "train": in_train, "eval": in_eval},
        panels(histogram("linear", sums[:, at], marks[0], "output of a unit"),
                     histogram("with ReLU, worst unit", relus[:, at], marks[1], "output of a unit")),
    )


def layernorm() -> Experiment:
    """LayerNorm makes each row mean 0 and variance 1, batch norm each column; RMSNorm leaves the mean alone."""
    dice = torch.Generator().manual_seed(6)
    x = torch.randn(32, 32, generator=dice)  # (rows of a batch, C)
    x = x + 2 * torch.randn(32, 1, generator=dice) + 2 * torch.randn(1, 32, generator=dice)  # uneven rows and columns
    with torch.no_grad():
        layer_norm, rms_norm = nn.LayerNorm(32), RMSNorm(32, eps=1e-5)
        by_row, rms = layer_norm(x), rms_norm(x)
        by_column = F.batch_norm(x, None, None, training=True)
        scale_free = largest(layer_norm(3 * x) - by_row)

    def spread(values: Tensor, dim: int) -> tuple[float, float]:
        """The largest mean and the variance furthest from 1 along a dimension."""
        var = values.var(dim, unbiased=False)
        return largest(values.mean(dim)), float(var[(var - 1).abs().argmax()])

    figures: dict[str, float] = {"one": 1, "times": 3, "scale_free": scale_free,
                                 "square": float(rms.square().mean(1).mean()), "rms_mean": largest(rms.mean(1))}
    for name, values, dim in (("before", x, 1), ("row", by_row, 1), ("column", by_row, 0), ("batch_row", by_column, 1),
                              ("batch_column", by_column, 0)):
        figures[f"{name}_mean"], figures[f"{name}_variance"] = spread(values, dim)
    return Experiment(
        "layernorm",
        "LayerNorm evens out rows",
        "What has mean zero and variance one behind LayerNorm: rows or columns?",
        ("Before it, rows have means up to {before_mean:.2f}, and the variance furthest from {one:.0f} is "
         "{before_variance:.2f}.",
         "Behind LayerNorm, rows: means up to {row_mean:.1e}, all variances {row_variance:.5f}; columns: means up to "
         "{column_mean:.2f}, the variance furthest from {one:.0f} is {column_variance:.2f}.",
         "Behind batch norm it is the other way round. Columns: means up to {batch_column_mean:.1e}, variances "
         "{batch_column_variance:.5f}; rows: means up to {batch_row_mean:.2f}, a variance of {batch_row_variance:.2f}. "
         "A row then depends on the other rows of its batch; LayerNorm's never does.",
         "LayerNorm of {times:.0f} x is LayerNorm of x, to within {scale_free:.1e}.",
         "RMSNorm, which divides and subtracts nothing: the mean square of a row is {square:.5f}, its mean stays (up "
         "to {rms_mean:.2f})."),
        figures,
        panels(*(matrix(title, values, around_zero=True, most=most, rows=rows, columns="channel", bar=False)
                       for title, values, most, rows in (("before", x, 6, "row"), ("LayerNorm", by_row, 3, ""),
                                                         ("batch norm", by_column, 3, ""))), columns=3, height=2.8),
    )


def first_loss() -> Experiment:
    """An untrained model should know nothing: ln V. A table from N(0, 1) claims to know, and is wrong: ln V + 1/2.

    The loss of a row of logits z with the target y is ln(sum of e^z) - z_y. Where z comes from N(0, s^2), z_y is 0 in
    the mean, and a sum of V numbers e^z is about V times their mean, e^(s^2 / 2): so the loss is about ln V + s^2 / 2.
    A sum of only 65 is uncertain, and its logarithm lower in the mean, by half its relative variance (e^(s^2) - 1) / V.
    """
    V, rows = SMALL.vocab_size, 20_000
    dice = torch.Generator().manual_seed(8)
    target = torch.randint(V, (rows,), generator=dice)
    unit = torch.randn(rows, V, generator=dice)
    scales = (0.02, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    by_scale = [float(F.cross_entropy(scale * unit, target)) for scale in scales]
    single = F.cross_entropy(unit, target, reduction="none")  # of each row alone

    idx = torch.randint(V, (64, 8), generator=dice)
    next_idx = torch.randint(V, (64, 8), generator=dice)
    figures = {"vocabulary": V, "one": 1, "uniform": float(F.cross_entropy(torch.zeros(rows, V), target)),
               "law": math.log(V) + 1 / 2, "finite": math.log(V) + 1 / 2 - (math.e - 1) / (2 * V),
               "gaussian": by_scale[scales.index(1.0)], "tokens": 32, "batch": float(single.std()) / math.sqrt(32),
               "small_scale": scales[0], "small": by_scale[0]}
    with seeded(8), torch.no_grad():
        for name, model in (("bigram", BigramModel(SMALL)), ("default", LayerNormModel(SMALL)),
                            ("careful", DropoutModel(SMALL))):
            figures[name] = float(F.cross_entropy(model(idx).flatten(0, 1), next_idx.flatten()))
    return Experiment(
        "first_loss",
        "The loss before any training",
        "What loss should an untrained model have, and why do some begin higher?",
        ("Equal probabilities for {vocabulary:.0f} characters: -ln({one:.0f}/{vocabulary:.0f}) = {uniform:.3f}.",
         "Logits from a unit Gaussian, as in the bigram's first table: {gaussian:.3f}. Expected is half a nat more, "
         "{law:.3f}, for a large vocabulary, and {finite:.3f} for this one. A single batch of {tokens:.0f} tokens is "
         "off by {batch:.2f} (standard deviation).",
         "Logits of standard deviation {small_scale:.2f}: {small:.3f}.",
         "Untrained models on random tokens: bigram {bigram:.3f}, LayerNorm rung {default:.3f}, dropout rung with its "
         "small first weights {careful:.3f}."),
        figures,
        panels(
            curves("loss of random logits", {
                "measured": (scales, by_scale),
                "ln V + s²/2": (scales, [math.log(V) + scale**2 / 2 for scale in scales]),
                "ln V": (scales, [math.log(V)] * len(scales))},
                "standard deviation s of the logits", "loss (nats)", expected=("ln V + s²/2", "ln V")),
            columns=1, height=4),
    )
