"""Results of well-known wrong answers to an exercise, each with a sentence that names the mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor

Miss = tuple[str, Tensor]
"""A sentence, and the result of the mistake that it names."""
Layer = Callable[[Tensor], Tensor]

# ---------------------------------------------------------------------------------- LayerNorm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Iterator[Miss]:
    """Yield the results of a LayerNorm with one mistake."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    spread = (variance + eps).sqrt()
    rows = (x - mean) / spread
    yield "the bias is not added", rows * weight
    yield "the weight is not applied", rows + bias
    yield "neither weight nor bias is applied", rows
    yield "the bias comes before the weight; multiply first, then add", (rows + bias) * weight
    for said, wrong in (
            ("the variance is divided by n - 1; use unbiased=False",
             (x - mean) / (x.var(-1, keepdim=True) + eps).sqrt()),
            ("eps is added to the root; add it to the variance", (x - mean) / (variance.sqrt() + eps)),
            ("eps is missing; add it to the variance", (x - mean) / variance.sqrt()),
            ("it divides by the variance; divide by its root", (x - mean) / (variance + eps)),
            ("the mean is not subtracted", x / spread),
            ("it divides by nothing; divide by the root of the variance", x - mean)):
        yield said, wrong * weight + bias
    ways: tuple[Any, ...] = (-1, 1, 0, (0, 1), (1, 2), None)
    for one, other in product(ways, ways):
        if (one, other) != (-1, -1):
            centered = x - x.mean(one, keepdim=True)
            part = "the mean" if other == -1 else "the variance" if one == -1 else "mean and variance"
            wrong = centered / (x.var(other, keepdim=True, unbiased=False) + eps).sqrt()
            yield f"{part} must run over the channels alone; use dim=-1", wrong * weight + bias


# ---------------------------------------------------------------------------------- a block

FORMS: dict[str, Callable[[Layer, Layer, Tensor], Tensor]] = {
    "": lambda part, norm, x: x + part(norm(x)),
    "{norm} comes after the sum of x and {part}; put it before {part}": lambda part, norm, x: norm(x + part(x)),
    "{norm} comes after {part}; put it before": lambda part, norm, x: x + norm(part(x)),
    "no norm comes before {part}; put {norm} there": lambda part, norm, x: x + part(x),
    "{part} does not add to x": lambda part, norm, x: part(norm(x)),
    "{norm} replaces x itself; {part} must add to x as it was": lambda part, norm, x: norm(x) + part(norm(x)),
    "{part} adds x twice": lambda part, norm, x: x + x + part(norm(x))}
"""Ways to write a part of a block with its norm; the first is right."""


def block(x: Tensor, parts: Sequence[Layer], norms: Sequence[Layer]) -> Iterator[Miss]:
    """Yield the results of a block with a mistake in one part or in both."""
    names = ({"part": "attention", "norm": "ln1"}, {"part": "the feed-forward layer", "norm": "ln2"})
    for (first, one), (second, other) in product(FORMS.items(), FORMS.items()):
        if first or second:
            said = (first or second).format(**names[not first])
            yield said, other(parts[1], norms[1], one(parts[0], norms[0], x))
    right = FORMS[""]
    for said, order in (("ln1 and ln2 have changed places", (1, 0)), ("ln1 comes before both parts", (0, 0)),
                        ("ln2 comes before both parts", (1, 1))):
        yield said, right(parts[1], norms[order[1]], right(parts[0], norms[order[0]], x))
    yield "the feed-forward layer reads x, not the sum of x and attention", (
        x + parts[0](norms[0](x)) + parts[1](norms[1](x)))
    yield "the feed-forward layer comes first; attention does", (
        right(parts[0], norms[0], right(parts[1], norms[1], x)))


# ---------------------------------------------------------------------------------- Muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(gradient: Tensor) -> Iterator[Miss]:
    """Yield the results of the five steps for a square matrix with one mistake."""
    unit = gradient / gradient.norm()
    for count in (*range(5), *range(6, 11)):
        yield f"it takes {count} steps, not five", _steps(unit, lambda x, a: _right(x, a @ a, a), count)
    for said, step in _steps_with_a_mistake():
        yield said, _steps(unit, step)
    fixed = unit @ unit.T
    yield "X X.T is computed once; compute it anew in each step", _steps(
        unit, lambda x, a: _right(x, fixed @ fixed, fixed))
    for dim in (0, 1):
        rows = gradient / gradient.norm(dim=dim, keepdim=True)
        yield "each row or column is divided by its own norm; divide by gradient.norm()", _steps(
            rows, lambda x, a: _right(x, a @ a, a))
    for size in (torch.linalg.matrix_norm(gradient, 2), gradient.abs().max(), gradient.square().sum()):
        yield "it divides by another number than gradient.norm()", _steps(
            gradient / size, lambda x, a: _right(x, a @ a, a))


def _steps_with_a_mistake() -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Yield a sentence, and a step that maps X and X X.T to the next X."""
    yield "a * a multiplies element by element; write a @ a", lambda x, a: _right(x, a * a, a)
    for i, term in enumerate(("3.4445 X", "4.7750 (X X.T) X", "2.0315 (X X.T)(X X.T) X")):
        yield f"the term {term} is missing", lambda x, a, i=i: _right(  # type: ignore[misc]
            x, a @ a, a, [0.0 if i == j else each for j, each in enumerate(COEFFICIENTS)])
    yield "the term with 4.7750 has the wrong sign", lambda x, a: _right(x, a @ a, a, (3.4445, 4.7750, 2.0315))
    for order in list(permutations(COEFFICIENTS))[1:]:
        yield "the coefficients have changed places", lambda x, a, order=order: _right(  # type: ignore[misc]
            x, a @ a, a, order)
    yield "the steps use X.T X; use X X.T", lambda x, a: _right(x, x.T @ x @ x.T @ x, x.T @ x)
    yield "the steps multiply X from the right; write (...) @ X", lambda x, a: (
        COEFFICIENTS[0] * x + x @ (COEFFICIENTS[1] * a + COEFFICIENTS[2] * a @ a))


def _right(x: Tensor, squared: Tensor, a: Tensor, numbers: Sequence[float] = COEFFICIENTS) -> Tensor:
    return numbers[0] * x + (numbers[1] * a + numbers[2] * squared) @ x


def _steps(x: Tensor, step: Callable[[Tensor, Tensor], Tensor], count: int = 5) -> Tensor:
    for _ in range(count):
        x = step(x, x @ x.T)
    return x


def named(found: Tensor, misses: Iterable[Miss], near: float) -> str:
    """Return the sentence of the mistake that gives a result; empty if none does."""
    for said, wrong in misses:
        if wrong.shape == found.shape and close(found, wrong, near):
            return said
    return ""


def close(found: Tensor, expected: Tensor, near: float) -> bool:
    """Return True if a result is near another one, relative to its largest value."""
    largest = float(expected.detach().abs().max())
    return bool(torch.isfinite(expected).all()) and distance(found, expected) <= near * max(1.0, largest)


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two results."""
    return float((found.detach().double() - expected.detach().double()).abs().max())
