"""Experiments on attention: averages, the mask, the scale of scores, who sees whom, positions, heads.

Each function is one experiment, from its tensors to what came out. B rows, T positions, C channels, D of a head.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.ladder.experiment import SMALL, Experiment, largest, seeded
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
    """Loop, matrix and softmax average in the same way, and so does a head whose queries or keys are all 0."""
    dice = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 32, generator=dice)  # (B, T, C)
    loop, product, softmax = average_by_loop(x), average_by_matrix(x), average_by_softmax(x)
    forms = max(largest(loop - product), largest(product - softmax), largest(softmax - loop))

    # whoever averages the unit vectors gets the weights themselves: row t of the identity is "only position t"
    average = average_by_softmax(torch.eye(8)[None])[0]  # (T, T)
    with seeded(1), torch.no_grad():
        head = Head(SMALL, head_size=16)
        for part in (head.query, head.key):  # queries and keys of variance 1, so that the choice can be seen
            nn.init.normal_(part.weight, std=32**-0.5)
        no_query, no_key = copy.deepcopy(head), copy.deepcopy(head)
        nn.init.zeros_(no_query.query.weight)  # all scores are 0 then
        nn.init.zeros_(no_key.key.weight)
        chosen, asks_nothing, says_nothing = (each.weights(x)[0] for each in (head, no_query, no_key))  # (T, T)

    return Experiment(
        "averages",
        "An average is attention with equal scores",
        "Are loop, matrix product and softmax the same average, and what has it to do with attention?",
        ("Loop, matrix product and softmax differ by at most {forms:.2g}.",
         "A head whose query weights are {zero:.0f} has the averaging weights, to within {no_query:.2g}; one whose key "
         "weights are {zero:.0f}, to within {no_key:.2g}.",
         "With random queries and keys the last position, which would give each of {positions:.0f} a weight of "
         "{equal:.3f}, gives from {least:.3f} to {most:.3f}: the weights have become a choice."),
        {"forms": forms, "zero": largest(no_query.query.weight), "no_query": largest(asks_nothing - average),
         "no_key": largest(says_nothing - average), "positions": x.shape[1], "equal": float(average[-1, 0]),
         "least": float(chosen[-1].min()), "most": float(chosen[-1].max()), "chosen": largest(chosen - average)},
        panels(matrix("averaging, or query = 0", asks_nothing, most=1), matrix("random query", chosen, most=1)),
    )


def mask() -> Experiment:
    """Scores, then -inf for the future, then softmax: and no logit knows of a later token."""
    dice = torch.Generator().manual_seed(2)
    score = torch.randn(8, 8, generator=dice)  # (T, T)
    tril = torch.tril(torch.ones(8, 8))
    masked = score.masked_fill(tril == 0, float("-inf"))  # e^-inf = 0
    weight = F.softmax(masked, dim=-1)

    with seeded(2), torch.no_grad():
        model = OneHeadModel(SMALL)
        idx = torch.randint(65, (1, 8), generator=dice)
        before = model(idx)[0]  # (T, V)
        change = torch.zeros(8, 8)  # which position's token was changed, how much each position's logits changed
        for t in range(8):
            other = idx.clone()
            other[0, t] = (idx[0, t] + 1) % 65
            change[t] = (model(other)[0] - before).abs().amax(dim=-1)  # (T, V) -> (T)

    return Experiment(
        "mask",
        "The triangular mask",
        "Does a position know anything of the tokens after it?",
        ("The rows of weights add up to {least_sum:.6f} to {most_sum:.6f}.",
         "The largest weight of a future token is {future:.1f}.",
         "In a model with one head another token changes logits before it by {earlier:.1f} at most, and its own or "
         "later ones by up to {later:.2f}."),
        {"least_sum": float(weight.sum(-1).min()), "most_sum": float(weight.sum(-1).max()),
         "future": largest(weight[tril == 0]), "earlier": largest(change.tril(-1)), "later": largest(change.triu())},
        panels(matrix("scores", score, around_zero=True), matrix("the future at -inf", masked, around_zero=True),
                     matrix("softmax", weight), matrix("change in the logits", change, rows="changed token",
                                                       columns="logits of position")),
    )


def variance() -> Experiment:
    """Scores of unit-Gaussian queries and keys spread as the head size; 1 / sqrt(D) takes that back, for softmax."""
    dice = torch.Generator().manual_seed(3)
    sizes = (4, 8, 16, 32, 64, 128, 256)
    # each score is a sum of D products of mean 0 and variance 1, so its variance is D
    measured = {D: variance_of_scores(D, 40_000 // D, dice) for D in sizes}

    D = 16
    q = torch.randn(40_000, 8, D, generator=dice)  # (B, T, D)
    k = torch.randn(40_000, 8, D, generator=dice)
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
    figures |= {"times": 8, "example": float(soft.max()), "example_times": float(sharp.max())}
    return Experiment(
        "variance",
        "Why scores are divided by the square root of the head size",
        "How far do scores spread, and what does softmax make of it?",
        ("Queries and keys of {head_size:.0f} unit-Gaussian channels: the variance of {scores:,.0f} scores is "
         "{raw:.3f} (standard error {error:.3f}), and {scaled:.4f} once they are divided by sqrt({head_size:.0f}).",
         "Over head sizes {smallest_size:.0f} to {largest_size:.0f} it grows from {smallest:.2f} to {largest:.1f}; "
         "scaled it stays between {low:.3f} and {high:.3f}.",
         "Softmax over {positions:.0f} positions: the largest weight is {raw_most:.2f} in the mean unscaled, "
         "{scaled_most:.2f} scaled; the entropy {raw_entropy:.2f} and {scaled_entropy:.2f} nats, of {even:.2f} for "
         "equal weights.",
         "The slope of softmax (the norm of its Jacobian) is {raw_slope:.2f} unscaled and {scaled_slope:.2f} scaled in "
         "the mean, and below {flat:.1f} in {raw_flat:.1%} of the rows unscaled, in {scaled_flat:.2%} scaled: where "
         "one position takes all, little gradient comes through.",
         "The lecture's five numbers: the largest weight is {example:.2f}; {times:.0f} times as large, they "
         "give {example_times:.2f}."),
        figures,
        panels(
            curves("variance of the scores", {
                "unscaled": (sizes, list(measured.values())),
                "scaled": (sizes, [v / n for n, v in measured.items()]),
                "theory: D": (sizes, sizes)}, "head size D", "variance", ("log", "log"), expected=("theory: D",)),
            bars("softmax of five scores", {"as it is": soft, "times 8": sharp}, "position", "weight")),
    )


def variance_of_scores(head_size: int, batch: int, dice: torch.Generator) -> float:
    """The variance of the scores of unit-Gaussian queries and keys (batch, 64, head_size)."""
    q, k = torch.randn(2, batch, 64, head_size, generator=dice)
    return float((q @ k.transpose(-2, -1)).var())


def entropy(weight: Tensor) -> Tensor:
    """How evenly weights (..., T) are spread, in nats: ln T for equal ones, 0 where one takes all."""
    return -(weight * weight.clamp_min(1e-30).log()).sum(-1)


def slope(weight: Tensor) -> Tensor:
    """The norm of softmax's Jacobian where its result is `weight` (..., T): diag(w) - w w^T."""
    jacobian = torch.diag_embed(weight) - weight[..., :, None] * weight[..., None, :]  # (..., T, T)
    return torch.linalg.matrix_norm(jacobian)


def masks() -> Experiment:
    """Encoder, decoder, and a prefix that is read both ways: one mask with three prefixes."""
    T = 8
    idx = torch.zeros(1, T, dtype=torch.int64)
    seen = {}
    for name, prefix in (("encoder", T), ("decoder", 0), ("prefix", 5)):
        _, mask = positions_and_mask(idx, block_size=T, prefix_B=torch.tensor([prefix]))  # the first `prefix` tokens see each other
        assert mask is not None
        seen[name] = mask[0, 0].float()  # (B, 1, T, T) -> (T, T)

    return Experiment(
        "masks",
        "Encoder and decoder differ in their mask",
        "Which tokens may see which?",
        ("In an encoder each of {positions:.0f} tokens sees all: {encoder:.0f} pairs.",
         "In a decoder each sees itself and those before it: {decoder:.0f} pairs. Only so can it learn to continue a "
         "text: what it shall predict is hidden.",
         "With a prefix (a source of {prefix_length:.0f} tokens, to be continued) the source is read both ways, the "
         "rest is a decoder: {prefix:.0f} pairs.",
         "The first token sees {encoder_first:.0f}, {decoder_first:.0f} and {prefix_first:.0f} tokens."),
        {"positions": T, "prefix_length": prefix, **{name: float(mask.sum()) for name, mask in seen.items()},
         **{f"{name}_first": float(mask[0].sum()) for name, mask in seen.items()},
         "decoder_from_triangle": largest(seen["decoder"] - torch.tril(torch.ones(T, T)))},
        panels(*(matrix(name, mask, rows="position" if name == "encoder" else "", columns="sees", bar=False)
                       for name, mask in seen.items()), columns=3, height=2.8),
    )


def rotary_positions() -> Experiment:
    """Turned queries and keys score by their distance; with a table of positions it matters where they stand."""
    T, C, D, near, far = 16, 32, 16, 10, 1000
    dice = torch.Generator().manual_seed(9)
    x = torch.randn(T, C, generator=dice)
    table = torch.randn(T + far, C, generator=dice)  # a position embedding
    with seeded(9):
        head = Head(replace(SMALL, block_size=T), head_size=D)

    def turned(start: int) -> Tensor:
        """Scores (T, T) of x with rotary positions from `start` on."""
        cos, sin = rope_cos_sin(torch.arange(start, start + T)[None], D, theta=10_000)
        q, k = (apply_rope(part(x)[None, :, None], cos, sin)[0, :, 0] for part in (head.query, head.key))  # (T, D)
        return q @ k.T * D**-0.5

    def added(start: int) -> Tensor:
        """Scores (T, T) of x with the table's rows from `start` on added to it."""
        placed = x + table[start : start + T]
        return head.query(placed) @ head.key(placed).T * D**-0.5

    with torch.no_grad():
        figures = {"near": near, "far": far, "size": largest(turned(0)), "turned": largest(turned(near) - turned(0)),
                   "turned_far": largest(turned(far) - turned(0)), "added": largest(added(near) - added(0))}
        starts = (0, near, far)
        drawings = [
            curves(title, {f"from position {start}": (range(T), scores(start)[-1].tolist()) for start in starts},
                   "key of token", "score of the last query", nested=True)
            for title, scores in (("rotary: one curve", turned), ("table: three curves", added))
        ]
    return Experiment(
        "rotary",
        "Rotary positions know distances only",
        "Does a score change when the same tokens stand further on in the text?",
        ("The scores are numbers up to {size:.2f}. With rotary positions, moving all tokens on by {near:.0f} changes "
         "them by at most {turned:.2g}; by {far:,.0f}, {turned_far:.2g}: rounding of the angles.",
         "With a table of positions that is added, moving on by {near:.0f} changes them by up to {added:.2f}."),
        figures,
        panels(*drawings),
    )


def heads() -> Experiment:
    """Heads one by one, or all in one tensor: stacking their weights turns the one into the other."""
    dice = torch.Generator().manual_seed(10)
    x = torch.randn(4, 8, 32, generator=dice)  # (B, T, C)
    with seeded(10), torch.no_grad():
        one_by_one, at_once = ProjectedAttention(SMALL), DropoutAttention(SMALL)  # SMALL drops nothing
        for name in ("query", "key", "value"):
            rows: list[Tensor] = [head.get_parameter(f"{name}.weight") for head in one_by_one.heads]  # H times (D, C)
            at_once.get_parameter(f"{name}.weight").copy_(torch.cat(rows))  # (C, C)
        at_once.proj.load_state_dict(one_by_one.proj.state_dict())
        maps = at_once.weights(x)[0]  # (B, H, T, T) -> (H, T, T)
        difference = largest(one_by_one(x) - at_once(x))

    return Experiment(
        "heads",
        "All heads in one tensor",
        "Can heads be computed together, as another dimension of the batch, with the same numbers?",
        ("{heads:.0f} heads of {channels:.0f} channels one by one ({one_by_one:,.0f} parameters) and all in one tensor "
         "({at_once:,.0f} parameters) differ by at most {difference:.2g}.",
         "{products_before:.0f} products for queries, keys and values become {products_after:.0f}."),
        {"heads": SMALL.n_head, "channels": SMALL.n_embd // SMALL.n_head, "difference": difference,
         "one_by_one": sum(p.numel() for p in one_by_one.parameters()), "products_before": 3 * SMALL.n_head,
         "at_once": sum(p.numel() for p in at_once.parameters()), "products_after": 3},
        panels(*(matrix(f"head {h + 1}", weight, most=1) for h, weight in enumerate(maps))),
    )
