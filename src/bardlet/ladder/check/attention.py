"""Attention in the record of a forward pass: its scores, its scale, its mask, its axis and its heads.

An attention is a softmax whose result multiplies values. Nothing depends on names or on the style of the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bardlet.ladder.check.softmax import DIVISIONS, MASKS, PRODUCTS, Softmax, origin, softmaxes
from bardlet.ladder.check.trace import MOVES, SCALES, Node, Trace, replay

SUMS = (*MASKS, "tanh", "__rsub__")
FUSED = "scaled_dot_product_attention"
STEPS = (*MOVES, *SCALES)
NEAR = 1e-4


@dataclass(frozen=True)
class Side:
    """An operand of a product. own: the dimension that the result keeps; shared: the one that is summed."""

    node: Node
    own: int
    shared: int


@dataclass(frozen=True)
class Attention:
    """One attention.

    scores: the input of the softmax, (..., queries, keys), None if they come from no product of queries and keys;
    weights: what multiplies the values, in the same layout; softmax: the result of the softmax in the same layout;
    axis_ok: False if the softmax does not run over the keys; factor: scores / (queries @ keys), None if unknown;
    head_size: the channels of a query; channels: those of the input; mixed: True if a view mixes positions and heads;
    summed: False if the exponentials of the scores are never divided by their sum.
    """

    modules: tuple[nn.Module, ...]
    scores: Tensor | None
    weights: Tensor
    softmax: Tensor
    axis_ok: bool
    factor: float | None
    head_size: int
    channels: int
    mixed: bool
    summed: bool = True

    @property
    def is_self(self) -> bool:
        """True if there are as many keys as queries."""
        return self.weights.shape[-1] == self.weights.shape[-2]

    def seen(self) -> Tensor:
        """Return which keys each query attends to in any row and head: (queries, keys)."""
        flat = self.weights.reshape(-1, *self.weights.shape[-2:])
        return (flat.nan_to_num(0).abs() > 1e-9).any(0)


def attentions(trace: Trace) -> list[Attention]:
    """Return every attention of a forward pass: PyTorch's own, then those of a softmax in the code, in order."""
    nodes = trace.nodes
    fused = (_fused(node, nodes[i:]) for i, node in enumerate(nodes) if node.name == FUSED)
    found = [each for each in fused if each is not None]
    places = {id(node): i for i, node in enumerate(nodes)}
    products: set[int] = set()
    for softmax in softmaxes(nodes):
        made = _plain(softmax, nodes[places.get(id(softmax.node), -1) + 1:])
        if made is not None and id(made[0]) not in products:
            products.add(id(made[0]))
            found.append(made[1])
    return found


# ---------------------------------------------------------------------------------- written out


def _plain(softmax: Softmax, later: Sequence[Node]) -> tuple[Node, Attention] | None:
    """Return the product with the values and the attention of a softmax; None if its result multiplies no values."""
    line = [softmax.node]
    for node in later:
        parent = next((each for each in node.parents if any(each is one for one in line)), None)
        if parent is None:
            continue
        if node.name in PRODUCTS:
            side = _side(node, parent)
            made = None if side is None else _described(softmax, side, node, later)
            return None if made is None else (node, made)
        if node.name in (*STEPS, *SUMS):
            line.append(node)
    return None


def _described(softmax: Softmax, side: Side, product: Node, later: Sequence[Node]) -> Attention | None:
    weights = side.node.value.movedim((side.own, side.shared), (-2, -1))
    result = _moved(side, softmax, softmax.value)
    if result is None:
        return None
    if softmax.late:
        weights = result
    scores = softmax.scores
    score = product_below(scores)
    if not softmax.summed and (score is None or _divides(product, later)):
        return None
    axis_ok = _runs_over_keys(softmax, side, result)
    if score is None:
        return Attention(softmax.node.modules, None, weights, result, axis_ok, None, 0, 0, False)
    factor, node = score
    mixed = _merge_mixes(product, later, side.node.value.shape[side.own])
    laid_out = _moved(side, softmax, scores.value)
    made = Attention(softmax.node.modules, laid_out, weights, result, axis_ok, factor, 0, 0, mixed, softmax.summed)
    return _with_sides(made, node)


def _divides(product: Node, later: Sequence[Node]) -> bool:
    """Return True if something divides the result of a product: its weights may be divided by their sum there."""
    return any(node.name in DIVISIONS and len(node.parents) == 2 and origin(node.parents[0]) is product
               for node in later)


def _moved(side: Side, softmax: Softmax, value: Tensor) -> Tensor | None:
    """Return a tensor in the layout of the softmax as (..., queries, keys)."""
    back = replay(side.node, softmax.node, value, (*STEPS, *SUMS))
    return None if back is None else back.movedim((side.own, side.shared), (-2, -1))


def _runs_over_keys(softmax: Softmax, side: Side, result: Tensor) -> bool:
    """Return True if the dimension of the softmax becomes the one over which values are summed."""
    if softmax.dim is None:
        rows = result.sum(-1)
        rows = rows[rows.isfinite() & (rows > 0)]  # a row that hides all keys says nothing
        return not softmax.summed or not bool(((rows - 1).abs() > 1e-3).any())
    node = softmax.node
    moved = replay(side.node, node, _marks(node.value.shape, softmax.dim), (*STEPS, *SUMS))
    if moved is None or moved.shape != side.node.value.shape:
        return True  # unknown
    return bool((moved == _marks(moved.shape, side.shared % moved.dim())).all())


def _marks(shape: Sequence[int], dim: int) -> Tensor:
    """Return a tensor in which each element is its index along one dimension."""
    marks = torch.arange(shape[dim], dtype=torch.float32).view([-1 if i == dim else 1 for i in range(len(shape))])
    return marks.expand(*shape).contiguous()


def _side(product: Node, operand: Node) -> Side | None:
    """Return the dimensions of one operand of a product of two tensors."""
    operands = product.parents
    if len(operands) != 2 or operand.value.dim() < 2:
        return None
    first = operands[0] is operand
    if product.name != "einsum":
        first = first if product.name != "__rmatmul__" else not first
        return Side(operand, -2, -1) if first else Side(operand, -1, -2)
    equation = product.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    mine, other = (terms[0], terms[1]) if first else (terms[1], terms[0])
    shared = [letter for letter in mine if letter in other and letter not in out and letter != "."]
    own = [letter for letter in mine if letter in out and letter not in other and letter != "."]
    if len(shared) != 1 or len(own) != 1:
        return None
    return Side(operand, _index(mine, own[0]), _index(mine, shared[0]))


def _index(term: str, letter: str) -> int:
    """Return the dimension of a letter, from the end if an ellipsis comes before it."""
    after = term.split("...")[-1]
    return term.index(letter) if "..." not in term else after.index(letter) - len(after)


def product_below(node: Node, depth: int = 0) -> tuple[float | None, Node] | None:
    """Return the product of queries and keys from which scores come, and the number that multiplies it on the way.

    The number is None if it is unknown. Returns None if there is no such product.
    """
    if node.name in PRODUCTS:
        return (1.0, node) if len(node.parents) == 2 and not _by_weight(node) else None
    if depth > 20 or node.name not in (*STEPS, *SUMS):
        return None
    for parent in node.parents:
        if parent.value.is_floating_point() and (below := product_below(parent, depth + 1)):
            factor, product = below
            step = _number(node, parent)
            return (None if factor is None or step is None else factor * step), product
    return None


def _by_weight(product: Node) -> bool:
    """Return True for a product with a parameter: a linear layer."""
    return any(isinstance(origin(each).source, nn.Parameter) for each in product.parents)


def _number(node: Node, parent: Node) -> float | None:
    """Return the number by which an operation multiplies its operand; None if it is not one number."""
    if node.name in ("mul", "mul_", "multiply", "div", "div_", "true_divide", "divide"):
        others = [each for each in node.args if each is not parent]
        if len(others) != 1:
            return None
        value = others[0].value if isinstance(others[0], Node) else others[0]
        if isinstance(value, Tensor):
            if value.numel() != 1:  # a mask of zeros and ones leaves the visible scores alone
                return 1.0 if bool(((value == 0) | (value == 1)).all()) else None
            if isinstance(origin(others[0]).source, nn.Parameter):
                return None  # a temperature that is learned
            value = value.item()
        if not isinstance(value, int | float) or value == 0:
            return None
        return float(value) if node.name.startswith("mul") else 1 / value
    return None if node.name == "tanh" else 1.0


# ---------------------------------------------------------------------------------- queries and keys


def _with_sides(attention: Attention, product: Node) -> Attention:
    """Add what the two operands of the product of queries and keys say."""
    sides = [_side(product, each) for each in product.parents]
    if any(each is None for each in sides):
        return attention
    factor, mixed, channels, head_size = attention.factor, attention.mixed, 0, 0
    for side in sides:
        assert side is not None
        head_size = side.node.value.shape[side.shared]
        number, linear = _linear_below(side.node)
        factor = None if factor is None or number is None else factor * number
        if linear is not None:
            channels = linear.parents[0].value.shape[-1]
            mixed = mixed or _mixes(side, linear)
    return replace(attention, factor=factor, mixed=mixed, channels=channels, head_size=head_size)


def _linear_below(node: Node) -> tuple[float | None, Node | None]:
    """Return the linear layer that made queries or keys, and the number that multiplies its output.

    The number is 1 without a linear layer: the operand is an input. It is None if something else lies between.
    """
    number: float | None = 1.0
    for _ in range(30):
        if node.name == "linear" or (node.name in PRODUCTS and _by_weight(node)) or node.name == "addmm":
            return number, node
        if node.name == "leaf":
            return number, None
        if node.name in ("add", "add_") and any(isinstance(each.source, nn.Parameter) for each in node.parents):
            parent = next(each for each in node.parents if not isinstance(each.source, nn.Parameter))  # a bias
        elif node.name in STEPS and node.parents:
            parent = next((each for each in node.parents if each.value.numel() > 1), node.parents[0])
        else:
            return None, None
        step = _number(node, parent)
        number = None if number is None or step is None else number * step
        node = parent
    return None, None


def _mixes(side: Side, linear: Node) -> bool:
    """Return True if the way from a linear layer (B, T, C) to queries or keys mixes positions."""
    if linear.value.dim() != 3:
        return False
    B, T, C = linear.value.shape
    marks = torch.arange(B * T, dtype=torch.float32).view(B, T, 1).expand(B, T, C).contiguous()
    moved = replay(side.node, linear, marks, STEPS)
    return moved is not None and not _in_order(moved, side.own, side.shared, B, T)


def _in_order(marks: Tensor, own: int, shared: int, B: int, T: int) -> bool:
    """Return True if each row of a marked tensor comes from its own position."""
    moved = marks.movedim((own, shared), (-2, -1))
    if moved.shape[-2] != T:
        return True  # another text, or a cache
    position = moved % T
    return bool((position == torch.arange(T, dtype=torch.float32)[:, None]).all())


def _merge_mixes(product: Node, later: Sequence[Node], queries: int) -> bool:
    """Return True if the way from the heads' outputs to the next layer mixes positions."""
    places = [i for i, size in enumerate(product.value.shape) if size == queries]
    if product.value.dim() < 4 or len(places) != 1:
        return False
    line, marked = [product], {id(product): _marks(product.value.shape, places[0])}
    last = product
    for node in later[[each is product for each in later].index(True) + 1:]:
        parent = next((each for each in node.parents if any(each is one for one in line)), None)
        if parent is None:
            continue
        if node.name not in STEPS:
            break
        moved = replay(node, parent, marked[id(parent)], STEPS)
        if moved is None:
            break
        line.append(node)
        marked[id(node)] = moved
        last = node
    merged = marked[id(last)]
    if merged.dim() != 3 or merged.shape[1] != queries:
        return False
    return not bool((merged == torch.arange(queries, dtype=torch.float32)[None, :, None]).all())


# ---------------------------------------------------------------------------------- PyTorch's function


def _fused(node: Node, later: Sequence[Node]) -> Attention | None:
    """Return the attention of F.scaled_dot_product_attention, computed from its arguments."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k = given["query"], given["key"]
    mask, scale = given.get("attn_mask"), given.get("scale")
    factor = float(scale) if isinstance(scale, int | float) else q.value.shape[-1] ** -0.5
    scores = q.value @ k.value.transpose(-2, -1) * factor
    if given.get("is_causal"):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, float("-inf"))
    if isinstance(mask, Node):
        keep = mask.value
        scores = scores.masked_fill(~keep, float("-inf")) if keep.dtype == torch.bool else scores + keep
    weights = scores.softmax(-1)
    product = Node("matmul", scores, torch.matmul, (q, Node("transpose", k.value.transpose(-2, -1),
                   torch.Tensor.transpose, (k, -2, -1))))
    mixed = _merge_mixes(node, later, q.value.shape[-2])
    base = Attention(node.modules, scores, weights, weights, True, factor, 0, 0, mixed)
    return _with_sides(base, product)
