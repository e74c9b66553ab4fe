"""The value of a constructor's argument with an unusual name, from what the class does with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from bardlet.ladder.check.sizes import value_of


def value_by_use(cls: ast.ClassDef | None, name: str) -> Any:
    """Return a size for an argument that is the length of an embedding table, True for a switch, else None."""
    constructors = [node for node in getattr(cls, "body", ()) if isinstance(node, ast.FunctionDef)
                    and node.name == "__init__"]
    for node in (each for constructor in constructors for each in ast.walk(constructor)):
        for target, value in _assigned(node):
            if any(_is(length, name) for length in _lengths(value)):
                return value_of("block_size" if "pos" in f"{target} {name}".lower() else "vocab_size")
    for node in (each for constructor in constructors for each in ast.walk(constructor)):
        if isinstance(node, ast.If | ast.IfExp) and _tests(node.test, name):
            return True
    return None


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield what a statement assigns, element by element: the target as text, and the value."""
    if not isinstance(node, ast.Assign):
        return
    value = node.value
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            yield from ((ast.unparse(one), what) for one, what in zip(target.elts, value.elts, strict=True))
        else:
            yield ast.unparse(target), value


def _lengths(value: ast.expr) -> Iterator[ast.expr]:
    """Yield the length of each embedding table that an expression makes."""
    for call in ast.walk(value):
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "Embedding":
            yield from call.args[:1]
            yield from (each.value for each in call.keywords if each.arg == "num_embeddings")


def _tests(test: ast.expr, name: str) -> bool:
    """Return True if a condition is an argument, its negation, or a combination with others."""
    if isinstance(test, ast.UnaryOp):
        return _tests(test.operand, name)
    if isinstance(test, ast.BoolOp):
        return any(_tests(each, name) for each in test.values)
    return _is(test, name)


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
