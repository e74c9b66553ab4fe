"""Experiments on attention: averages, the causal mask, the scale of scores, mask types, positions, heads.

Each function is one experiment, from its tensors to its results. Shapes: B rows, T positions, C channels, D head size.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.experiment import SMALL, Experiment, max_abs, seeded
from bardlet.ladder.experiments_paint import bars, curves, matrix, panels
from bardlet.models.layers import apply_rope, positions_and_mask, rope_cos_sin
from bardlet.models.lecture import (
    DropoutAttention,
    Head,
    OneHeadModel,
    ProjectedAttention,
    average_by_loop,
    average_by_matrix,
    average_by_softmax,
)


def averages() -> Experiment:
    """Loop, matrix product and softmax compute the same average, and so does a head whose queries or keys are all 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 32, generator=generator)  # (B, T, C)
    loop, product, softmax = average_by_loop(x), average_by_matrix(x), average_by_softmax(x)
    difference = max(max_abs(loop - product), max_abs(product - softmax), max_abs(softmax - loop))

    # averaging the unit vectors returns the weights themselves: row t of the identity is "only position t"
    average = average_by_softmax(torch.eye(8)[None])[0]  # (T, T)
    with seeded(1), torch.no_grad():
        head = Head(SMALL, head_size=16)
        for part in (head.query, head.key):  # queries and keys of variance 1: weights that clearly differ
            nn.init.normal_(part.weight, std=32**-0.5)
        no_query, no_key = copy.deepcopy(head), copy.deepcopy(head)
        nn.init.zeros_(no_query.query.weight)  # so all scores are 0
        nn.init.zeros_(no_key.key.weight)
        chosen, zero_query, zero_key = (module.weights(x)[0] for module in (head, no_query, no_key))  # (T, T)

    return Experiment(
        "averages",
        "An average is attention with equal scores",
        "Do a loop, a matrix product and softmax compute the same average, and how is that attention?",
        ("Loop, matrix product and softmax differ by at most {forms:.2g}.",
         "With all query weights {zero:.0f}, or all key weights {zero:.0f}, a head computes the average. Its "
         "attention weights then differ from equal weights by at most {unequal:.2g}.",
         "Averaging gives each of the {positions:.0f} positions a weight of {equal:.3f}. With random queries and keys, "
         "the last position gives weights from {least:.3f} to {most:.3f}: they now depend on the text."),
        {"forms": difference, "zero": max_abs(no_query.query.weight), "no_query": max_abs(zero_query - average),
         "no_key": max_abs(zero_key - average),
         "unequal": max(max_abs(zero_query - average), max_abs(zero_key - average)),
         "positions": x.shape[1], "equal": float(average[-1, 0]),
         "least": float(chosen[-1].min()), "most": float(chosen[-1].max()), "chosen": max_abs(chosen - average)},
        panels(matrix("averaging, or query = 0", zero_query, vmax=1), matrix("random query", chosen, vmax=1)),
    )


def mask() -> Experiment:
    """Scores, -inf for the future, softmax: no logit depends on a later token."""
    generator = torch.Generator().manual_seed(2)
    score = torch.randn(8, 8, generator=generator)  # (T, T)
    tril = torch.tril(torch.ones(8, 8))
    masked = score.masked_fill(tril == 0, float("-inf"))  # e^-inf = 0
    weight = F.softmax(masked, dim=-1)

    with seeded(2), torch.no_grad():
        model = OneHeadModel(SMALL)
        idx = torch.randint(65, (1, 8), generator=generator)
        before = model(idx)[0]  # (T, V)
        change = torch.zeros(8, 8)  # [t, s]: how much the logits at s change when the token at t does
        for t in range(8):
            changed = idx.clone()
            changed[0, t] = (idx[0, t] + 1) % 65
            change[t] = (model(changed)[0] - before).abs().amax(dim=-1)  # (T, V) -> (T)

    return Experiment(
        "mask",
        "The triangular mask",
        "Does a position know anything about the tokens after it?",
        ("Every row of weights sums to {one:.0f}, to within {sum_error:.1g}.",
         "The largest weight on a future token is {future:.1f}.",
         "In a model with one head, replacing a token changes earlier logits by at most {earlier:.1f}, and logits at "
         "its own or later positions by up to {later:.2f}."),
        {"one": 1, "sum_error": max_abs(weight.sum(-1) - 1), "future": max_abs(weight[tril == 0]),
         "earlier": max_abs(change.tril(-1)), "later": max_abs(change.triu())},
        panels(matrix("scores", score, around_zero=True), matrix("future set to -inf", masked, around_zero=True),
               matrix("softmax", weight),
               matrix("change in the logits", change, rows="changed token", columns="logits at position")),
    )


def variance() -> Experiment:
    """The variance of the scores grows with the head size; a factor of 1 / sqrt(D) keeps softmax soft."""
    generator = torch.Generator().manual_seed(3)
    sizes = (4, 8, 16, 32, 64, 128, 256)
    # a score is a sum of D products, each with mean 0 and variance 1, so its variance is D
    measured = {D: variance_of_scores(D, 40_000 // D, generator) for D in sizes}

    D = 16
    q = torch.randn(40_000, 8, D, generator=generator)  # (B, T, D)
    k = torch.randn(40_000, 8, D, generator=generator)
    raw = q @ k.transpose(-2, -1)  # (B, T, D) @ (B, D, T) -> (B, T, T): 2,560,000 scores
    scaled = raw * D**-0.5
    row_B = raw.square().mean(dim=(1, 2))  # the mean of a score is 0; rows of the batch are independent
    figures = {"head_size": D, "scores": raw.numel(), "raw": float(raw.var()), "scaled": float(scaled.var()),
               "error": float(row_B.std()) / math.sqrt(len(row_B)), "positions": 8, "even": math.log(8),
               "flat": 0.1, "smallest_size": sizes[0], "largest_size": sizes[-1],
               "smallest": measured[sizes[0]], "largest": measured[sizes[-1]],
               "low": min(v / n for n, v in measured.items()), "high": max(v / n for n, v in measured.items())}
    for name, score in (("raw", raw), ("scaled", scaled)):
        weight = F.softmax(score[:2000], dim=-1)  # (2000, T, T)
        figures |= {f"{name}_most": float(weight.amax(-1).mean()), f"{name}_entropy": float(entropy(weight).mean()),
                    f"{name}_slope": float(slope(weight).mean()),
                    f"{name}_flat": float((slope(weight) < 0.1).float().mean())}

    example = torch.tensor([0.1, -0.2, 0.3, -0.2, 0.5])  # the lecture's
    soft, sharp = F.softmax(example, dim=-1), F.softmax(example * 8, dim=-1)
    figures |= {"times": 8, "example": float(soft.max()), "example_times": float(sharp.max()),
                **{f"x{i}": float(x) for i, x in enumerate(example)}}
    return Experiment(
        "variance",
        "Why scores are divided by the square root of the head size",
        "How large is the variance of the scores, and how does it affect softmax?",
        ("Queries and keys with {head_size:.0f} unit-Gaussian channels: the variance of {scores:,.0f} scores is "
         "{raw:.3f} (standard error {error:.3f}). Divided by sqrt({head_size:.0f}), it is {scaled:.4f}.",
         "From head size {smallest_size:.0f} to {largest_size:.0f}, the variance grows from {smallest:.2f} to "
         "{largest:.1f}; scaled, it stays between {low:.3f} and {high:.3f}.",
         "Softmax over {positions:.0f} positions: the mean largest weight is {raw_most:.2f} unscaled and "
         "{scaled_most:.2f} scaled; the mean entropy is {raw_entropy:.2f} and {scaled_entropy:.2f} nats, and "
         "{even:.2f} for equal weights.",
         "The mean slope of softmax (the norm of its Jacobian) is {raw_slope:.2f} unscaled and {scaled_slope:.2f} "
         "scaled. It is below {flat:.1f} in {raw_flat:.1%} of the rows unscaled, and in {scaled_flat:.2%} scaled: "
         "where one position takes almost all the weight, little gradient flows.",
         "The lecture's example: softmax([{x0:.1f}, {x1:.1f}, {x2:.1f}, {x3:.1f}, {x4:.1f}]) has a largest weight of "
         "{example:.2f}. Multiply the five numbers by {times:.0f}, and it is {example_times:.2f}."),
        figures,
        panels(
            curves("variance of the scores", {
                "unscaled": (sizes, list(measured.values())),
                "scaled": (sizes, [v / n for n, v in measured.items()]),
                "theory: D": (sizes, sizes)}, "head size D", "variance", ("log", "log"), expected=("theory: D",)),
            bars("softmax of five scores", {"as they are": soft, "times 8": sharp}, "position", "weight")),
    )


def variance_of_scores(head_size: int, batch: int, generator: torch.Generator) -> float:
    """Return the variance of the scores of unit-Gaussian queries and keys (batch, 64, head_size)."""
    q, k = torch.randn(2, batch, 64, head_size, generator=generator)
    return float((q @ k.transpose(-2, -1)).var())


def entropy(weight: Tensor) -> Tensor:
    """Return the entropy of weights (..., T) in nats: ln T if all are equal, 0 if one of them is 1."""
    return -(weight * weight.clamp_min(1e-30).log()).sum(-1)


def slope(weight: Tensor) -> Tensor:
    """Return the norm of softmax's Jacobian at the output `weight` (..., T): diag(w) - w w^T."""
    jacobian = torch.diag_embed(weight) - weight[..., :, None] * weight[..., None, :]  # (..., T, T)
    return torch.linalg.matrix_norm(jacobian)


def masks() -> Experiment:
    """Encoder, decoder and prefix masks: one function with three prefix lengths."""
    T = 8
    idx = torch.zeros(1, T, dtype=torch.int64)
    visible = {}
    for name, prefix in (("encoder", T), ("decoder", 0), ("prefix", 5)):
        # the first `prefix` tokens attend to each other in both directions
        _, mask = positions_and_mask(idx, block_size=T, prefix_B=torch.tensor([prefix]))
        assert mask is not None
        visible[name] = mask[0, 0].float()  # (B, 1, T, T) -> (T, T)

    return Experiment(
        "masks",
        "Encoder and decoder differ in their mask",
        "Which tokens may attend to which?",
        ("In an encoder, each of the {positions:.0f} tokens attends to all tokens: {encoder:.0f} pairs.",
         "In a decoder, each token attends to itself and to the tokens before it: {decoder:.0f} pairs. The next token "
         "is hidden, so the decoder has to learn to predict it.",
         "With a prefix (a source of {prefix_length:.0f} tokens), the source attends in both directions and the rest "
         "is a decoder: {prefix:.0f} pairs.",
         "The first token attends to {encoder_first:.0f} tokens in the encoder, to {decoder_first:.0f} (itself) in the "
         "decoder, and to {prefix_first:.0f} with the prefix."),
        {"positions": T, "prefix_length": prefix, **{name: float(mask.sum()) for name, mask in visible.items()},
         **{f"{name}_first": float(mask[0].sum()) for name, mask in visible.items()},
         "decoder_from_triangle": max_abs(visible["decoder"] - torch.tril(torch.ones(T, T)))},
        panels(*(matrix(name, mask, rows="position" if name == "encoder" else "", columns="attends to", bar=False)
                 for name, mask in visible.items()), columns=3, height=2.8),
    )


def rotary_positions() -> Experiment:
    """Rotary scores depend on the distance of two tokens; with a position table they depend on the positions."""
    T, C, D, near, far = 16, 32, 16, 10, 1000
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(T, C, generator=generator)
    table = torch.randn(T + far, C, generator=generator)  # a position embedding
    with seeded(9):
        head = Head(replace(SMALL, block_size=T), head_size=D)

    def rotary(start: int) -> Tensor:
        """Return the scores (T, T) of x with rotary positions counted from `start`."""
        cos, sin = rope_cos_sin(torch.arange(start, start + T)[None], D, theta=10_000)
        q, k = (apply_rope(part(x)[None, :, None], cos, sin)[0, :, 0] for part in (head.query, head.key))  # (T, D)
        return q @ k.T * D**-0.5

    def with_table(start: int) -> Tensor:
        """Return the scores (T, T) of x plus the position embeddings from row `start`."""
        embedded = x + table[start : start + T]
        return head.query(embedded) @ head.key(embedded).T * D**-0.5

    with torch.no_grad():
        figures = {"near": near, "far": far, "size": max_abs(rotary(0)), "turned": max_abs(rotary(near) - rotary(0)),
                   "turned_far": max_abs(rotary(far) - rotary(0)),
                   "added": max_abs(with_table(near) - with_table(0))}
        starts = (0, near, far)
        drawings = [
            curves(title, {f"from position {start}": (range(T), scores(start)[-1].tolist()) for start in starts},
                   "key position", "score of the last query", nested=True)
            for title, scores in (("rotary: one curve", rotary), ("table: three curves", with_table))
        ]
    return Experiment(
        "rotary",
        "Rotary positions encode only distances",
        "Does a score change when the same tokens appear later in the text?",
        ("The scores are numbers up to {size:.2f}. With rotary positions, shifting all tokens by {near:.0f} positions "
         "changes them by at most {turned:.2g}, and by {far:,.0f} positions, {turned_far:.2g}: the angles are rounded.",
         "With a position table, shifting by {near:.0f} positions changes them by up to {added:.2f}."),
        figures,
        panels(*drawings),
    )


def heads() -> Experiment:
    """Separate heads and heads in one tensor: stacking the weights turns the first into the second."""
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(4, 8, 32, generator=generator)  # (B, T, C)
    with seeded(10), torch.no_grad():
        one_by_one, at_once = ProjectedAttention(SMALL), DropoutAttention(SMALL)  # SMALL has no dropout
        for name in ("query", "key", "value"):
            rows: list[Tensor] = [head.get_parameter(f"{name}.weight") for head in one_by_one.heads]  # H of (D, C)
            at_once.get_parameter(f"{name}.weight").copy_(torch.cat(rows))  # (C, C)
        at_once.proj.load_state_dict(one_by_one.proj.state_dict())
        maps = at_once.weights(x)[0]  # (B, H, T, T) -> (H, T, T)
        difference = max_abs(one_by_one(x) - at_once(x))

    return Experiment(
        "heads",
        "All heads in one tensor",
        "Can all heads be computed at once, as a batch dimension, with the same result?",
        ("{heads:.0f} heads of {channels:.0f} channels, computed one by one ({one_by_one:,.0f} parameters) and in one "
         "tensor ({at_once:,.0f} parameters), differ by at most {difference:.2g}.",
         "{products_before:.0f} matrix products for queries, keys and values become {products_after:.0f}."),
        {"heads": SMALL.n_head, "channels": SMALL.n_embd // SMALL.n_head, "difference": difference,
         "one_by_one": sum(p.numel() for p in one_by_one.parameters()), "products_before": 3 * SMALL.n_head,
         "at_once": sum(p.numel() for p in at_once.parameters()), "products_after": 3},
        panels(*(matrix(f"head {h + 1}", weight, vmax=1) for h, weight in enumerate(maps))),
    )
