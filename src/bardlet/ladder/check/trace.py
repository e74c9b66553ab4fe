"""A record of the tensor operations of a forward pass: each result, and the results that it was computed from.

The tests read the record, so they need no names: a softmax is a softmax in any style of code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

MOST_OPERATIONS = 50_000
"""Operations that are recorded; a forward pass of a small model has a few hundred."""
READ_ONLY = ("T", "mT", "H", "mH", "data")
"""Properties of a tensor that are tensors."""


@dataclass(eq=False)
class Node:
    """The result of an operation.

    args and kwargs are those of the call, with nodes in place of tensors. value: a copy, made before anything could
    change it. modules: the modules whose forward made the call, the innermost last.
    """

    name: str
    value: Tensor
    call: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int | None = None
    modules: tuple[nn.Module, ...] = ()
    source: Tensor | None = None

    @property
    def parents(self) -> list[Node]:
        """The nodes among the arguments."""
        return list(_nodes((self.args, self.kwargs)))


@dataclass
class Visit:
    """A call of a module: its arguments without keywords, the nodes of the tensors among them, and its output."""

    module: nn.Module
    args: tuple[Any, ...]
    inputs: list[Node]
    output: Node | None
    first: int
    """Number of operations before the call."""
    last: int


@dataclass(frozen=True)
class Failure:
    """The operation that raised an error. index: True if an index was too high."""

    name: str
    shapes: list[tuple[int, ...]]
    modules: tuple[nn.Module, ...]
    index: bool = False


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _nodes(each)
    elif isinstance(value, dict):
        yield from _nodes(list(value.values()))


def replace(value: Any, new: Callable[[Any], Any]) -> Any:
    """Return nested lists, tuples and dicts with `new` applied to each value."""
    if type(value) in (list, tuple):
        return type(value)(replace(each, new) for each in value)
    if type(value) is dict:
        return {key: replace(each, new) for key, each in value.items()}
    return new(value)


class Trace(TorchFunctionMode):
    """Records operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.visits: list[Visit] = []
        self.failure: Failure | None = None
        self._stack: list[tuple[nn.Module, int]] = []
        self._node_of: dict[int, tuple[Node, Tensor]] = {}

    def node(self, tensor: Tensor) -> Node:
        """Return the node of a tensor; a new one without parents if no operation made it."""
        known = self._node_of.get(id(tensor))
        if known is None:
            made = Node("leaf", tensor.detach().clone(), source=tensor)
            self._node_of[id(tensor)] = made, tensor
            return made
        return known[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
            if name not in READ_ONLY:
                return func(*args, **kwargs)
        modules = tuple(module for module, _ in self._stack)

        def known(value: Any) -> Any:
            return self.node(value) if isinstance(value, Tensor) else value

        if len(self.nodes) >= MOST_OPERATIONS:
            return func(*args, **kwargs)
        recorded = replace(args, known), replace(kwargs, known)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            shapes = [tuple(node.value.shape) for node in _nodes(recorded)]
            self.failure = self.failure or Failure(name, shapes, modules, isinstance(error, IndexError))
            raise
        if name == "__setitem__" and isinstance(args[0], Tensor):  # it changes its first argument, and returns None
            result = args[0]
        several = isinstance(result, list | tuple)
        for i, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                node = Node(name, tensor.detach().clone(), func, *recorded, i if several else None, modules)
                self.nodes.append(node)
                self._node_of[id(tensor)] = node, tensor
        return None if name == "__setitem__" else result

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append((module, len(self.nodes)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._stack:
            entered, first = self._stack.pop()
            if entered is module:
                inputs = [self.node(tensor) for tensor in args if isinstance(tensor, Tensor)]
                made = self.node(output) if isinstance(output, Tensor) else None
                self.visits.append(Visit(module, tuple(args), inputs, made, first, len(self.nodes)))
                return


class Quiet(TorchFunctionMode):
    """Switches dropout off, also where the learner's code forgets to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout") and args:
            return args[0]
        if name == "scaled_dot_product_attention":
            args, kwargs["dropout_p"] = (args[:4], 0.0) if len(args) <= 5 else ((*args[:4], 0.0, *args[5:]), None)
            kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return func(*args, **kwargs)


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every operation within, and the modules that made it."""
    recorder = Trace()
    hooks = (module_hooks.register_module_forward_pre_hook(recorder._enter),
             module_hooks.register_module_forward_hook(recorder._leave))
    try:
        with recorder:
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def replay(node: Node, source: Node, values: Tensor, steps: tuple[str, ...]) -> Tensor | None:
    """Compute `node` again from `source` with other values, through the operations `steps` alone.

    Returns None if another operation lies between the two. Operations on numbers are skipped, so `values` may mark
    positions, which then show where each element of `node` comes from.
    """
    if node is source:
        return values
    if node.call is None or node.name not in steps:
        return None
    parents = [(parent, replay(parent, source, values, steps)) for parent in node.parents]
    moved = [(parent, value) for parent, value in parents if value is not None]
    if len(moved) != 1:
        return None
    [(parent, value)] = moved
    if node.name not in MOVES:
        return value if value.shape == node.value.shape else None

    def new(each: Any) -> Any:
        return (value if each is parent else each.value) if isinstance(each, Node) else each

    result = node.call(*replace(node.args, new), **replace(node.kwargs, new))
    return result if node.output is None else result[node.output]


MOVES = ("view", "reshape", "transpose", "permute", "split", "chunk", "unbind", "__getitem__", "squeeze", "unsqueeze",
         "flatten", "unflatten", "contiguous", "T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", "select",
         "narrow", "tensor_split", "view_as", "t", "adjoint", "expand", "clone", "split_with_sizes", "_shape_as_tensor")
"""Operations that move elements without computing."""
SCALES = ("mul", "mul_", "div", "div_", "true_divide", "multiply", "divide", "float", "to", "type_as", "half", "double",
          "dropout", "dropout_", "feature_dropout", "alpha_dropout", "detach", "type")
"""Operations that keep every element at its index."""
