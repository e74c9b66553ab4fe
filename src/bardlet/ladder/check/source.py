"""Read a learner's file: take imports, classes, functions and constants from its tree, never its training loop."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError, one_line
from bardlet.ladder.check.sizes import SUPPLIED, size_of, value_of

MOST_BYTES = 2_000_000
"""A longer file is data."""
PURE = {"abs", "all", "any", "bool", "dict", "enumerate", "float", "frozenset", "int", "len", "list", "map", "max",
        "min", "pow", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip", "SimpleNamespace",
        "namedtuple", "field", "dataclass", "TypeVar", "NamedTuple", "NewType", "Namespace", "property", "partial"}
"""Functions that a constant may call."""
PURE_OWNERS = {"math", "np", "numpy", "types", "typing", "dataclasses", "collections"}
TENSORS = {"tril", "triu", "ones", "zeros", "arange", "tensor", "full", "ones_like", "zeros_like", "float", "bool",
           "long", "device", "is_available", "masked_fill", "view", "unsqueeze", "manual_seed", "to",
           "is_bf16_supported"}
"""Functions of torch, and methods of tensors, that a constant may call."""
CONFIG = re.compile(r"(?i)config|conf$|cfg|args|param|setting|option|namespace|hyper")


@dataclass(frozen=True)
class Source:
    """A learner's file.

    tree: all of it, for the tests that read; selected: the part that runs.
    """

    path: Path
    tree: ast.Module
    selected: ast.Module
    cells: tuple[tuple[int, int], ...] = ()
    """Of a notebook: the first line and the number of each code cell that is read."""

    @property
    def classes(self) -> dict[str, ast.ClassDef]:
        """The classes by name, the last of each name."""
        return {node.name: node for node in self.selected.body if isinstance(node, ast.ClassDef)}

    def place(self, line: int) -> str:
        """Return a line as file:line; of a notebook, as its code cell and the line there."""
        before = [(first, number) for first, number in self.cells if first <= line]
        if not before:
            return f"{self.path.name}:{line}"
        first, number = before[-1]
        return f"{self.path.name}, code cell {number}, line {line - first + 1}"


def read(path: Path) -> Source:
    """Return the source of a .py file or a notebook.

    Raises:
        BardletError: it cannot be read, is too long, or is not Python.
    """
    try:
        if not path.is_file():
            raise BardletError(f"{path}: no such file; name the file with your classes, as in my_gpt.py")
        if path.stat().st_size > MOST_BYTES:
            raise BardletError(f"{path}: is larger than 2 MB; name the file with your classes alone")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BardletError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    cells: tuple[tuple[int, int], ...] = ()
    if path.suffix == ".ipynb":
        text, cells = _cells(path, text)
    text = re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", text)  # commands of a notebook
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise BardletError(f"{path}{line}: is not valid Python ({error.msg}); correct it") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise BardletError(f"{path}: is not valid Python ({one_line(error)})") from None
    return Source(path, tree, select(tree), cells)


def _cells(path: Path, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the code cells of a notebook as one text, and the first line and the number of each."""
    try:
        cells = json.loads(text)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BardletError(f"{path}: is not a notebook; save it again, or export it as .py") from None
    starts, line = [], 1
    kept = [(number, cell) for number, cell in enumerate(code, start=1) if not cell.lstrip().startswith("%%")]
    for number, cell in kept:
        starts.append((line, number))
        line += cell.count("\n") + 1
    return "\n".join(cell for _, cell in kept), tuple(starts)


def select(tree: ast.Module) -> ast.Module:
    """Return the part of a module that check runs, with its sizes replaced by those of check."""
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    body = list(_selected(tree.body, classes))
    module = ast.Module(body=body, type_ignores=[])
    return ast.fix_missing_locations(_Sizes().visit(module))


def _selected(body: list[ast.stmt], classes: set[str]) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kept.append(node)
        elif isinstance(node, ast.If):  # a main guard, or a choice of the device
            kept += _selected(node.body, classes) + _selected(node.orelse, classes)
        elif isinstance(node, ast.Try):
            kept += _selected(node.body, classes)
        elif isinstance(node, ast.With):
            kept += [each for each in _selected(node.body, classes) if isinstance(each, ast.ClassDef | ast.FunctionDef)]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _targets(node):
            if set(_targets(node)) & SUPPLIED:
                continue
            if _is_constant(node.value, classes):
                kept.append(node)
    return kept


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """Return the names that a statement assigns; empty for attributes and elements."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names: list[str] = []
    for target in targets:
        each = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        if not all(isinstance(one, ast.Name) for one in each):
            return []
        names += [one.id for one in each if isinstance(one, ast.Name)]
    return names


def _is_constant(value: ast.expr, classes: set[str]) -> bool:
    """Return True if an expression only computes: it calls nothing but pure functions and classes of settings."""
    for node in ast.walk(value):
        if isinstance(node, ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr):
            return False
        if isinstance(node, ast.Call) and not _is_pure(node.func, classes) and not _inside_lambda(value, node):
            return False
    return True


def _inside_lambda(value: ast.expr, call: ast.Call) -> bool:
    return any(call is inner for node in ast.walk(value) if isinstance(node, ast.Lambda) for inner in ast.walk(node))


def _is_pure(func: ast.expr, classes: set[str]) -> bool:
    if isinstance(func, ast.Name):
        return func.id in PURE or (func.id in classes and bool(CONFIG.search(func.id)))
    if isinstance(func, ast.Attribute):
        owner = ast.unparse(func.value)
        return owner.split(".")[0] in PURE_OWNERS or func.attr in TENSORS
    return False


class _Sizes(ast.NodeTransformer):
    """Replaces sizes that are written as numbers, wherever the module names them."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Replace n_embd = 384, and the values of a dict or a call of settings."""
        names = _targets(node)
        if len(names) == 1 and len(node.targets) == 1:
            node.value = self._new(names[0], node.value)
        elif isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(names):
            node.value.elts = [self._new(name, value) for name, value in zip(names, node.value.elts, strict=True)]
        return self._settings(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Replace n_embd: int = 384."""
        if isinstance(node.target, ast.Name) and node.value is not None:
            node.value = self._new(node.target.id, node.value)
        return self._settings(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Leave the code of functions as it is, but for the name of the device."""
        if node.name == "__init__":
            for argument, default in zip(node.args.args[-len(node.args.defaults):], node.args.defaults, strict=False):
                if isinstance(default, ast.Constant):
                    default.value = self._value(argument.arg, default.value)
            for argument, keyword in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if isinstance(keyword, ast.Constant):
                    keyword.value = self._value(argument.arg, keyword.value)
        return _Device().visit(node)

    def _settings(self, node: ast.Assign | ast.AnnAssign) -> ast.AST:
        for each in ast.walk(node):
            if isinstance(each, ast.Dict):
                for key, value in zip(each.keys, each.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str) and isinstance(value, ast.Constant):
                        value.value = self._value(key.value, value.value)
            elif isinstance(each, ast.keyword) and each.arg and isinstance(each.value, ast.Constant):
                each.value.value = self._value(each.arg, each.value.value)
        return _Device().visit(node)

    def _new(self, name: str, value: ast.expr) -> ast.expr:
        """Return the value of a size, if it is written as a number or as the product of numbers."""
        numbers = all(isinstance(each, ast.Constant | ast.BinOp | ast.operator) for each in ast.walk(value))
        if numbers and len(name) > 1 and size_of(name):
            return ast.copy_location(ast.Constant(value_of(size_of(name))), value)
        return value

    def _value(self, name: str, value: Any) -> Any:
        size = size_of(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and len(name) > 1 and size:
            return value_of(size)
        return value


class _Device(ast.NodeTransformer):
    """check runs on the CPU."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Replace the name of another device."""
        if isinstance(node.value, str) and re.fullmatch(r"(cuda|mps|xpu)(:\d+)?", node.value):
            return ast.copy_location(ast.Constant("cpu"), node)
        return node
