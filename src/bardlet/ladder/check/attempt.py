"""A learner's attempt at an exercise: its functions and layers by name, and the comparison with a known result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.errors import BardletError
from bardlet.ladder.check.build import Untestable, build
from bardlet.ladder.check.load import Loaded
from bardlet.ladder.check.misses import Miss, close, distance, named

NEAR = 1e-4
"""Largest difference from a known result, relative to its largest value."""


class Wrong(BardletError):
    """A result that differs from the known one; the message says how."""


@dataclass(frozen=True)
class Test:
    """A test of one part of an exercise. where: the function; holds: what is true if it passes."""

    where: str
    holds: str
    run: Callable[[Attempt], None]


class Attempt:
    """A learner's file with an exercise."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def named(self, name: str) -> Any:
        """Return a function or class of the file.

        Raises:
            Wrong: the file has none of that name, or it cannot be defined.
        """
        value = self.loaded.names.get(name)
        if not callable(value):
            raise Wrong(self.loaded.problems.get(name) or f"the file has no {name}; keep the names of the starter file")
        return value

    def module(self, name: str, *arguments: Any) -> Any:
        """Return an instance of a class, in evaluation mode, with weights that differ from those at the start.

        Raises:
            Wrong: it cannot be built.
        """
        cls = self.named(name)
        torch.manual_seed(1337)
        try:
            module = cls(*arguments).eval() if arguments else build(self.loaded, name)
        except Untestable as error:
            if "NotImplementedError" in str(error):
                raise NotImplementedError from None
            raise Wrong(str(error)) from None
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return module


def layer(module: nn.Module, name: str) -> Any:
    """Return a layer or weight of a module by its name in the starter file."""
    if not hasattr(module, name):
        raise Wrong(f"{type(module).__name__} has no {name}; keep the names of the starter file")
    return getattr(module, name)


def same(found: object, expected: Tensor, meaning: str, near: float = NEAR, known: Iterable[Miss] = ()) -> None:
    """Compare a result with the known one. known: results of mistakes, with the sentence that names each.

    Raises:
        Wrong: it is not a tensor of the same shape, or differs.
    """
    if not isinstance(found, Tensor):
        raise Wrong(f"it returns {kind(found)} where a tensor is expected: {meaning}")
    if found.shape != expected.shape:
        raise Wrong(f"the shape is {tuple(found.shape)}, not {tuple(expected.shape)}: {meaning}")
    if not bool(torch.isfinite(found).all()):
        raise Wrong(f"the result has values that are not finite: {meaning}")
    if not close(found, expected, near):
        raise Wrong(named(found, known, near) or f"the result is off by {distance(found, expected):.2g}: {meaning}")


def kind(value: object) -> str:
    """Return the type of a value in words."""
    return "None" if value is None else f"a {type(value).__name__}"
