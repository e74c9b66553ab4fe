"""Run the selected part of a learner's file: imports, classes, functions and constants, one statement at a time.

This is the only file of bardlet that runs code of somebody else, in a process of its own (`worker.py`).
"""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import math
import sys
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from bardlet.errors import BardletError, is_out_of_memory, one_line
from bardlet.ladder.check.sizes import SIZES, SUPPLIED, Settings, size_of, value_of
from bardlet.ladder.check.source import Source, read

MODULE = "learner"
"""Name of the learner's file as a module."""
SOURCE = "__bardlet_source__"
"""Name of the source among the names of a module."""
SETTINGS = ("args", "config", "cfg", "hparams", "params", "conf", "opt", "hp", "configs", "settings", "hyperparams")
"""Names of a configuration that the file makes in a part that does not run."""

LEVELS = 2
"""Folders above the file's in which its imports are looked for, as in `from src.models import Block`."""


class Missing:
    """Stands for a package that is not installed. Its use is an error that names the package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(self.package)

    def __getitem__(self, _: Any) -> Missing:  # an annotation
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise BardletError(f"needs the package {self.package}, which is not installed")


@dataclass
class Loaded:
    """A learner's file after its selected part has run. problems: statements that failed, by the name they define."""

    source: Source
    module: types.ModuleType
    text: str
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, Any]:
        """The names of the module."""
        return vars(self.module)

    @property
    def modules(self) -> dict[str, type[nn.Module]]:
        """The classes of the file that are modules of PyTorch."""
        return {name: value for name in self.source.classes if isinstance(value := self.names.get(name), type)
                and issubclass(value, nn.Module)}


def supplies(text: str) -> dict[str, Any]:
    """Return the names of a module that depend on the text."""
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    back = dict(enumerate(characters))
    data = torch.tensor([index[character] for character in text])
    cut = len(data) * 9 // 10
    words: dict[str, Any] = dict.fromkeys(SUPPLIED)
    words |= dict.fromkeys(("text", "raw_text", "corpus", "train_text"), text)
    words |= dict.fromkeys(("chars", "vocab", "characters"), characters)
    words |= dict.fromkeys(("stoi", "char_to_idx", "char_to_int", "char2idx", "ch2i", "s2i"), index)
    words |= dict.fromkeys(("itos", "idx_to_char", "int_to_char", "idx2char", "i2ch", "i2s"), back)
    words |= dict.fromkeys(("data", "tokens"), data)
    words |= dict.fromkeys(("train_data", "train_ids"), data[:cut])
    words |= dict.fromkeys(("val_data", "val_ids", "valid_data", "test_data"), data[cut:])
    words["vocab_size"] = SIZES["vocab_size"]
    words["encode"] = lambda string: [index[character] for character in string if character in index]
    words["decode"] = lambda ids: "".join(back.get(int(i), "") for i in ids)
    return words


def load(source: Source, text: str) -> Loaded:
    """Run the selected part of a file and return its module."""
    for kind in (torch.Tensor, nn.Module):
        kind.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    sys.meta_path.append(_Neighbors(source.path.parent, text))
    module = types.ModuleType(MODULE)
    module.__file__ = str(source.path)
    sys.modules[MODULE] = module
    loaded = Loaded(source, module, text)
    vars(module).update({**_undefined(source, supplies(text)), SOURCE: source})
    for statement in source.selected.body:
        _run(statement, loaded)
    return loaded


def _undefined(source: Source, words: dict[str, Any]) -> dict[str, Any]:
    """Return values for the names that the selected part uses and never defines."""
    known: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "device": "cpu", **words}
    used = {node.id for node in ast.walk(source.selected) if isinstance(node, ast.Name)} - _defined(source)
    values = {name: known[name] for name in used & known.keys()}
    values |= {name: Settings() for name in used & set(SETTINGS)}
    values |= {name: value_of(size_of(name)) for name in used - known.keys() if len(name) > 1 and size_of(name)
               and (name.isupper() or name[0].islower())}
    return {name: value for name, value in values.items() if not hasattr(builtins, name)}


def _defined(source: Source) -> set[str]:
    """Return the names of imports, classes and functions at the top of a file."""
    names = set()
    for node in source.selected.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return names


def _run(statement: ast.stmt, loaded: Loaded) -> None:
    """Run one statement. An error of a constant is no problem: whoever needs it will say so."""
    code = compile(ast.Module(body=[statement], type_ignores=[]), str(loaded.source.path), "exec")
    try:
        exec(code, loaded.names)
    except ImportError as error:
        package = error.name or "that the file imports"
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                name = alias.asname or alias.name.split(".")[0]
                loaded.names.setdefault(name, Missing(package))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        name = getattr(statement, "name", "")
        if name:
            loaded.problems[name] = raised(error)
        for each in ast.walk(statement) if isinstance(statement, ast.Assign) else ():  # V = len(alphabet), of a text
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store) and size_of(each.id):
                loaded.names.setdefault(each.id, value_of(size_of(each.id)))


def raised(error: BaseException) -> str:
    """Return an error in words, with the line of the learner's code in which it arose: file:line."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        source = frame.f_globals.get(SOURCE)
        if isinstance(source, Source):
            place = f" at {source.place(line)}"
    return f"{type(error).__name__}{place}: {one_line(error)}".removesuffix(": ")


class _Neighbors(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the files next to the learner's, the selected part of each alone."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: types.ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a neighbor; None for any other name."""
        for root in (self.folder, *self.folder.parents[:LEVELS]):
            file = root.joinpath(*name.split("."))
            if file.with_suffix(".py").is_file():
                return importlib.machinery.ModuleSpec(name, self, origin=str(file.with_suffix(".py")))
            if file.is_dir() and any(file.glob("*.py")):
                return importlib.machinery.ModuleSpec(name, self, origin=str(file / "__init__.py"), is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """Leave the making of the module to Python."""
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the selected part of a neighbor."""
        origin = Path((module.__spec__ and module.__spec__.origin) or "")
        if not origin.is_file():
            return
        with suppress(BardletError):
            neighbor = Loaded(read(origin), module, self.text)
            vars(module).update({**_undefined(neighbor.source, supplies(self.text)), SOURCE: neighbor.source})
            for statement in neighbor.source.selected.body:
                _run(statement, neighbor)
