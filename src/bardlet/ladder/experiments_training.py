"""Experiments on what makes a deep network trainable: residual connections, dropout, norms, the initial loss.

Each function is one experiment, from its tensors to its results. Shapes: B rows, T positions, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.experiment import SMALL, Experiment, max_abs, seeded
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
    """The gradient at the input of each of 24 untrained blocks, with and without residual connections."""
    depth = 24
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 8, 32, generator=generator, dtype=torch.float64)  # (B, T, C), in place of the embeddings
    direction = torch.randn(32, 8, 32, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm()  # the gradient of the loss, with norm 1
    with seeded(4):
        # float64: without residual connections, the squared gradients underflow in float32
        blocks = nn.ModuleList(ResidualBlock(SMALL) for _ in range(depth)).double()
        normed = nn.ModuleList(LayerNormBlock(SMALL) for _ in range(depth)).double()

    def norms(blocks: nn.ModuleList, residual: bool) -> list[float]:
        """Return the norm of the gradient at the input of each block and after the last."""
        stream = [x.clone().requires_grad_()]
        for block in blocks:
            h = stream[-1]
            stream.append(block(h) if residual else block.ffwd(block.sa(h)))  # type: ignore[operator]
        loss = (stream[-1] * direction).sum()
        return [float(gradient.norm()) for gradient in torch.autograd.grad(loss, stream)]

    stacks = {"residual": (blocks, True), "plain": (blocks, False), "norm": (normed, True)}
    by_stack = {name: norms(stack, residual) for name, (stack, residual) in stacks.items()}
    figures: dict[str, float] = {"depth": depth, "shallow": SMALL.n_layer}
    for name, (stack, residual) in stacks.items():
        shallow = norms(stack[: SMALL.n_layer], residual)
        figures[name] = by_stack[name][0] / by_stack[name][-2]  # at the first block's input / at the last block's
        figures[f"{name}_shallow"] = shallow[0] / shallow[-2]
    passed = range(depth + 1)
    return Experiment(
        "residual",
        "Residual connections carry the gradient",
        "How much of the gradient reaches the first of many untrained blocks?",
        ("In {depth:.0f} blocks without residual connections, the first block gets {plain:.1e} times the gradient of "
         "the last: too little to learn from.",
         "With residual connections, the first block gets {residual:.2f} times the gradient of the last, because each "
         "block in between adds its own share. With LayerNorm before each sublayer as well, it is {norm:.2f} times.",
         "In {shallow:.0f} blocks, as in the lecture, the ratio of first to last is {plain_shallow:.1e} without "
         "residual connections, {residual_shallow:.2f} with them, and {norm_shallow:.2f} with LayerNorm as well."),
        figures,
        panels(
            curves("gradient in a stack of untrained blocks", {
                "residual connections": (passed, by_stack["residual"]), "without": (passed, by_stack["plain"]),
                "residual and LayerNorm": (passed, by_stack["norm"])},
                "blocks passed", "norm of the gradient", ("linear", "log")), columns=1, height=4.2),
    )


def dropout() -> Experiment:
    """Dropout zeroes values in training and scales up the others, so that the mean matches eval mode."""
    p, draws = 0.2, 20_000
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 32, generator=generator)  # (1, C)
    idx = torch.randint(65, (4, 8), generator=generator)
    with seeded(5), torch.no_grad():
        drop, linear, nonlinear = nn.Dropout(p), nn.Linear(32, 32), FeedForward(SMALL)  # FeedForward ends in a ReLU
        ones = drop(torch.ones(1_000_000))
        dropped = drop(x.expand(draws, 32))  # the same row under `draws` different masks
        sums, relus = linear(dropped), nonlinear(dropped)  # (draws, C)
        linear_eval, relu_eval = linear(drop.eval()(x)), nonlinear(drop.eval()(x))  # dropout is off in eval mode
        model = DropoutModel(replace(SMALL, dropout=p))
        in_train = max_abs(model.train()(idx) - model(idx))
        in_eval = max_abs(model.eval()(idx) - model(idx))

    def z_scores(values: Tensor, expected: Tensor) -> Tensor:
        """Return the distance between the means of `values` (draws, C) and `expected`, in standard errors: (C)."""
        error = values.std(dim=0) / math.sqrt(draws)
        return (values.mean(dim=0) - expected[0]) / error.clamp_min(1e-9)

    unit = int((relus.mean(0) - relu_eval[0]).abs().argmax())  # the unit whose mean is furthest from eval mode
    marks = [{"eval": float(expected[0, unit]), "mean": float(values[:, unit].mean())}
             for values, expected in ((sums, linear_eval), (relus, relu_eval))]
    return Experiment(
        "dropout",
        "Dropout in training and after it",
        "What does dropout change, and why does eval mode need no correction?",
        ("Out of {numbers:,.0f} ones, dropout at {p:.1f} zeroes a fraction of {zeros:.4f} and scales the others to "
         "{kept:.2f} = {one:.0f} / ({one:.0f} - {p:.1f}). The mean stays {mean:.4f}.",
         "Add a linear layer: the mean over {draws:,.0f} draws is within {linear:.1f} standard errors of eval mode in "
         "all {units:.0f} units. That is chance.",
         "Add a ReLU as well, and it is more than chance: up to {nonlinear:.0f} standard errors. The means differ from "
         "eval mode by {gap:.3f} on average, and the mean output is {size:.3f}: close, but not equal.",
         "The logits of two forward passes of a model differ by up to {train:.3f} in training mode, and by {eval:.1f} "
         "in eval mode."),
        {"p": p, "numbers": ones.numel(), "zeros": float((ones == 0).float().mean()), "kept": float(ones.max()),
         "one": 1, "mean": float(ones.mean()), "draws": draws, "units": 32,
         "linear": max_abs(z_scores(sums, linear_eval)), "nonlinear": max_abs(z_scores(relus, relu_eval)),
         "gap": float((relus.mean(0) - relu_eval[0]).abs().mean()),
         "size": float(relu_eval.mean()), "train": in_train, "eval": in_eval},
        panels(histogram("linear", sums[:, unit], marks[0], "output of a unit"),
               histogram("with ReLU, worst unit", relus[:, unit], marks[1], "output of a unit")),
    )


def layernorm() -> Experiment:
    """LayerNorm gives each row mean 0 and variance 1, batch norm each column; RMSNorm keeps the mean."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(32, 32, generator=generator)  # (rows of a batch, C)
    # give rows and columns different means
    x = x + 2 * torch.randn(32, 1, generator=generator) + 2 * torch.randn(1, 32, generator=generator)
    with torch.no_grad():
        layer_norm, rms_norm = nn.LayerNorm(32), RMSNorm(32, eps=1e-5)
        by_row, rms = layer_norm(x), rms_norm(x)
        by_column = F.batch_norm(x, None, None, training=True)
        scale_error = max_abs(layer_norm(3 * x) - by_row)

    def spread(values: Tensor, dim: int) -> tuple[float, float]:
        """Return the largest absolute mean and the variance furthest from 1 along a dimension."""
        var = values.var(dim, unbiased=False)
        return max_abs(values.mean(dim)), float(var[(var - 1).abs().argmax()])

    figures: dict[str, float] = {"one": 1, "times": 3, "scale_free": scale_error,
                                 "square": float(rms.square().mean(1).mean()), "rms_mean": max_abs(rms.mean(1))}
    for name, values, dim in (("before", x, 1), ("row", by_row, 1), ("column", by_row, 0), ("batch_row", by_column, 1),
                              ("batch_column", by_column, 0)):
        figures[f"{name}_mean"], figures[f"{name}_variance"] = spread(values, dim)
    return Experiment(
        "layernorm",
        "LayerNorm normalizes rows",
        "Does LayerNorm give mean zero and variance one to rows or to columns?",
        ("A mean below is the largest absolute mean of any row (or column). A variance is the one furthest from "
         "{one:.0f}.",
         "Before any norm, rows: mean {before_mean:.2f}, variance {before_variance:.2f}.",
         "After LayerNorm, rows: mean {row_mean:.1e}, variance {row_variance:.5f}. Columns: mean {column_mean:.2f}, "
         "variance {column_variance:.2f}.",
         "After batch norm, columns: mean {batch_column_mean:.1e}, variance {batch_column_variance:.5f}. Rows: mean "
         "{batch_row_mean:.2f}, variance {batch_row_variance:.2f}. A row then depends on the other rows of its batch; "
         "with LayerNorm it never does.",
         "LayerNorm of {times:.0f} x equals LayerNorm of x, to within {scale_free:.1e}.",
         "RMSNorm only divides: the mean square of each row is {square:.5f}, and the largest absolute mean of a row is "
         "still {rms_mean:.2f}."),
        figures,
        panels(*(matrix(title, values, around_zero=True, vmax=vmax, rows=rows, columns="channel", bar=False)
                 for title, values, vmax, rows in (("before", x, 6, "row"), ("LayerNorm", by_row, 3, ""),
                                                   ("batch norm", by_column, 3, ""))), columns=3, height=2.8),
    )


def first_loss() -> Experiment:
    """An untrained model should know nothing: ln V. A table from N(0, 1) is confidently wrong: ln V + 1/2.

    For a row of logits z and a target y the loss is ln(sum of e^z) - z_y. If z ~ N(0, s^2), the mean of z_y is 0, and
    the sum over V entries is about V times the mean of e^z, e^(s^2 / 2): the loss is about ln V + s^2 / 2. With only
    65 entries the sum varies, which lowers its expected logarithm by half its relative variance (e^(s^2) - 1) / V.
    """
    V, rows = SMALL.vocab_size, 20_000
    generator = torch.Generator().manual_seed(8)
    target = torch.randint(V, (rows,), generator=generator)
    unit = torch.randn(rows, V, generator=generator)
    scales = (0.02, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    by_scale = [float(F.cross_entropy(scale * unit, target)) for scale in scales]
    single = F.cross_entropy(unit, target, reduction="none")  # per row

    idx = torch.randint(V, (64, 8), generator=generator)
    next_idx = torch.randint(V, (64, 8), generator=generator)
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
        "What loss should an untrained model have, and why do some models start higher?",
        ("Equal probabilities for {vocabulary:.0f} characters give a loss of -ln({one:.0f}/{vocabulary:.0f}) = "
         "{uniform:.3f} nats.",
         "Unit-Gaussian logits, as in the bigram's initial table, give {gaussian:.3f} nats. Theory predicts half "
         "a nat more than for equal probabilities, {law:.3f} nats, and for a vocabulary as small as this {finite:.3f}. "
         "The loss of a single batch of {tokens:.0f} tokens has a standard deviation of {batch:.2f} nats.",
         "Logits with a standard deviation of {small_scale:.2f} give {small:.3f} nats.",
         "Untrained models on random tokens, in nats: bigram {bigram:.3f}, LayerNorm rung {default:.3f}, dropout rung "
         "with its small initial weights {careful:.3f}."),
        figures,
        panels(
            curves("loss of random logits", {
                "measured": (scales, by_scale),
                "ln V + s²/2": (scales, [math.log(V) + scale**2 / 2 for scale in scales]),
                "ln V": (scales, [math.log(V)] * len(scales))},
                "standard deviation s of the logits", "loss (nats)", expected=("ln V + s²/2", "ln V")),
            columns=1, height=4),
    )
