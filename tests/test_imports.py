"""The order of the rooms (top-level modules), and rules for every source file, checked on the syntax tree."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bardlet"

ROOMS = ("cli", "server", "api", "export", "runner", "doctor", "ladder", "stages", "planning", "evaluation", "training",
         "run", "inference", "data", "tokenizer", "runtime", "models", "ops", "config", "console", "errors")
"""From top to bottom: a room imports only from itself and the rooms below it, without cycles."""
ENTRANCES = ("__init__", "__main__", "harness")
"""Files at the root that belong to no room: they only call the rooms."""


def name_of(path: Path) -> str:
    """Return the dotted name of a source file, without `bardlet.`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return the nodes of a file's syntax tree; the first is the module."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def modules() -> set[str]:
    """Return the names of all files, without `bardlet.`."""
    return {name_of(path) for path in SOURCE.rglob("*.py")}


@cache
def imports_of(path: Path) -> set[str]:
    """Return the bardlet modules that a file imports, at the top or inside functions, without `bardlet.`."""
    imported = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.startswith("bardlet")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bardlet":
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("bardlet").lstrip(".") for name in imported}
    return {name if name in modules() else name.rpartition(".")[0] for name in names} - {""}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem not in ("__init__", "__main__"))
INSIDE = [path for path in FILES if name_of(path) not in ENTRANCES]


def room_of(name: str) -> int:
    """Return the index in ROOMS of a module's room."""
    assert name.split(".")[0] in ROOMS, f"{name} is in no room: add its room to ROOMS"
    return ROOMS.index(name.split(".")[0])


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """No file imports from a room above its own."""
    name = name_of(path)
    for imported in imports_of(path):
        assert room_of(imported) >= room_of(name), f"{name} imports {imported}"


def test_there_is_no_import_cycle() -> None:
    """No file imports itself through others, not even inside a function."""
    remaining = {name_of(path): imports_of(path) for path in INSIDE}
    while remaining:
        leaves = {name for name, others in remaining.items() if not others & (remaining.keys() - {name})}
        assert leaves, f"an import cycle among {', '.join(sorted(remaining))}"
        remaining = {name: others for name, others in remaining.items() if name not in leaves}


def test_the_root_is_small() -> None:
    """Code belongs in rooms; only a few files are at the root."""
    assert len(list(SOURCE.glob("*.py"))) <= 8


def test_imports_of_finds_imports() -> None:
    """Also inside functions."""
    assert {"run.lock", "config.settings", "errors"} <= imports_of(SOURCE / "run" / "folder.py")
    assert "doctor" in imports_of(SOURCE / "cli" / "doctor.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_are_documented(path: Path) -> None:
    """Every public module, class, function and method has a docstring, except overloads.

    The docstring of the class covers `forward`, and in models/lecture.py also `logits`.
    """
    nodes = nodes_of(path)
    assert isinstance(nodes[0], ast.Module) and ast.get_docstring(nodes[0]), f"{path.name}: the module"
    for node in nodes:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: class {node.name}"
        elif not isinstance(node, ast.Module):
            continue
        for child in node.body:
            if not isinstance(child, ast.FunctionDef) or child.name.startswith("_"):
                continue
            is_overload = "overload" in map(ast.unparse, child.decorator_list)
            in_class_docstring = ("forward", "logits") if path.name == "lecture.py" else ("forward",)
            if not is_overload and child.name not in in_class_docstring:
                assert ast.get_docstring(child), f"{path.name}: {child.name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_docstring_begins_with_a_question(path: Path) -> None:
    """It is an imperative or a noun phrase: those of functions, and those below a constant or a field."""
    for node in nodes_of(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first = node.value.value.split(maxsplit=1)[:1]
            assert first not in (["What"], ["Who"], ["Where"], ["How"], ["Why"]), f"{path.name}:{node.lineno}"


RUNS_CODE = {"ladder.check.load": {"exec"}}
"""`bardlet check` runs a learner's file, in a process of its own; no other file runs code that it reads."""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_code_from_files_is_executed(path: Path) -> None:
    """No pickle, no torch.load, no eval or exec, no remote code."""
    allowed = RUNS_CODE.get(name_of(path), set())
    for node in nodes_of(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "shelve", "marshal", "dill", "joblib"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "__import__"} - allowed, f"{path.name}: {called}"
            assert not any(k.arg in ("trust_remote_code", "allow_pickle") for k in node.keywords)
