"""A softmax in the record of a forward pass: PyTorch's, or one that is written out as exp(scores) / sum.

Written out, it may subtract the maximum, mask before or after the sum, and divide before or after the product with the
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bardlet.ladder.check.trace import MOVES, SCALES, Node

EXPONENTIALS = ("exp", "exp_")
DIVISIONS = ("div", "div_", "true_divide", "divide")
INVERSES = ("reciprocal", "reciprocal_", "__rdiv__", "__rtruediv__")
PRODUCTS = ("matmul", "bmm", "mm", "__matmul__", "__rmatmul__", "einsum", "baddbmm", "dot")
MASKS = ("add", "add_", "sub", "sub_", "masked_fill", "masked_fill_", "where", "clamp", "nan_to_num", "__setitem__",
         "tril", "tril_", "triu", "triu_", "clamp_", "clamp_min", "clamp_min_")
DEEP = 20
"""Operations between the parts of a softmax."""


@dataclass(frozen=True)
class Softmax:
    """A softmax.

    node: its result, which later operations use; scores: its input; value: its result before a mask that comes after
    the sum; dim: its dimension, None if the sums of `value` show it; late: True if `node` is not divided yet; summed:
    False if nothing divides it at all.
    """

    node: Node
    scores: Node
    value: Tensor
    dim: int | None = None
    late: bool = False
    summed: bool = True


def softmaxes(nodes: Sequence[Node]) -> Iterator[Softmax]:
    """Yield the softmaxes of a record, in the order of their results; exponentials that nothing divides come last."""
    divided: list[Node] = []
    for node in nodes:
        if node.value.dim() < 2:
            continue
        if node.name in ("softmax", "_softmax"):
            yield Softmax(node, node.parents[0], node.value, _dim(node))
        elif node.name in EXPONENTIALS:
            if (scores := _of_logarithm(node)) is not None:
                divided.append(node)
                yield Softmax(node, scores, node.value)
        elif (found := _divided(node)) is not None:
            made, exponentials = found
            divided += exponentials
            yield made
    for node in nodes:
        if node.name in EXPONENTIALS and node.value.dim() >= 2 and not any(node is each for each in divided):
            yield Softmax(node, node.parents[0], node.value, summed=False)


def _dim(softmax: Node) -> int:
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if not isinstance(dim, int):  # PyTorch's old default
        dim = 0 if softmax.value.dim() in (0, 1, 3) else 1
    return dim % softmax.value.dim()


def _of_logarithm(node: Node) -> Node | None:
    """Return the scores if an exponential is that of a log-softmax, or of scores minus their logsumexp."""
    below = origin(node.parents[0])
    if below.name in ("log_softmax", "_log_softmax"):
        return below.parents[0]
    if below.name in ("sub", "sub_") and len(below.parents) == 2 and origin(below.parents[1]).name == "logsumexp":
        return below.parents[0]
    return None


def _divided(node: Node) -> tuple[Softmax, list[Node]] | None:
    """Return the softmax that ends in a division, and its exponentials."""
    for top, total in _fractions(node):
        summed = _summed(total)
        below = None if summed is None else exponential(summed)
        if summed is None or below is None:
            continue
        above = exponential(top)
        if above is not None and _equal(above, below):
            return Softmax(node, below.parents[0], _quotient(summed, total, node.value)), [above, below]
        product = origin(top)
        for operand in product.parents if product.name in PRODUCTS else ():
            above = exponential(operand)
            if above is not None and _equal(above, below):
                value = _quotient(operand, total, operand.value)
                return Softmax(operand, below.parents[0], value, late=True), [above, below]
    return None


def _fractions(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield the two operands of a division, also of a product with an inverse."""
    parents = node.parents
    if len(parents) != 2:
        return
    if node.name in DIVISIONS:
        yield parents[0], parents[1]
    elif node.name in ("mul", "mul_", "multiply"):
        for top, inverse in (parents, parents[::-1]):
            below = origin(inverse)
            if below.name in INVERSES or (below.name == "pow" and below.args[1] == -1):
                yield top, below.parents[0]


def _summed(total: Node) -> Node | None:
    """Return the tensor whose sum a denominator is, perhaps with a small number added."""
    for _ in range(DEEP):
        if total.name in ("sum", "nansum") and total.parents:
            return total.parents[0]
        if total.name not in (*MOVES, *MASKS, *SCALES) or not total.parents:
            return None
        total = max(total.parents, key=lambda each: each.value.numel())
    return None


def exponential(node: Node, depth: int = 0) -> Node | None:
    """Return the exponential from which a tensor comes through moves, masks and factors alone."""
    if node.name in EXPONENTIALS:
        return node
    if depth > DEEP or node.name not in (*MOVES, *MASKS, *SCALES):
        return None
    floats = (each for each in node.parents if each.value.is_floating_point())
    return next((found for each in floats if (found := exponential(each, depth + 1)) is not None), None)


def origin(node: Node) -> Node:
    """Return the node that an operation made, below those that only move elements."""
    while node.name in MOVES and node.parents:
        node = node.parents[0]
    return node


def _equal(one: Node, other: Node) -> bool:
    return one is other or (one.value.shape == other.value.shape and torch.equal(one.value, other.value))


def _quotient(top: Node, total: Node, otherwise: Tensor) -> Tensor:
    """Return a fraction in the shape of its numerator; `otherwise` if that is another one."""
    try:
        made = top.value / total.value
    except RuntimeError:
        return otherwise
    return made if made.shape == otherwise.shape else otherwise
