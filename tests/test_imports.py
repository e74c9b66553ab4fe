"""The order of the rooms: who may import whom, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bardlet"

ROOMS = ("cli", "runner", "ladder", "doctor", "stages", "planning", "evaluation", "training", "run", "inference",
         "data", "tokenizer", "runtime", "models", "ops", "config", "console", "errors")
"""From top to bottom: a room imports from the rooms below it, and its files from each other without a circle."""
ENTRANCES = ("__init__", "__main__", "harness")
"""Files at the root that belong to no room: they only call what is inside."""


def name_of(path: Path) -> str:
    """The dotted name below bardlet of a source file."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The names below bardlet that a file imports, wherever in the file it does so."""
    modules = {name_of(p) for p in SOURCE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("bardlet")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bardlet":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.removeprefix("bardlet").lstrip(".") for name in found}
    exact = {name if name in modules else name.rpartition(".")[0] for name in below}
    return exact - {""}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem not in ("__init__", "__main__"))
INSIDE = [path for path in FILES if name_of(path) not in ENTRANCES]


def room_of(name: str) -> int:
    """The place of a module's room, from the top."""
    assert name.split(".")[0] in ROOMS, f"{name} stands in no room: add it to the order of this test"
    return ROOMS.index(name.split(".")[0])


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """No file imports from a room above its own."""
    me = name_of(path)
    for other in imports_of(path):
        assert room_of(other) >= room_of(me), f"{me} imports {other}"


def test_there_is_no_circle() -> None:
    """No file imports itself by way of others, be it inside a function."""
    below = {name_of(path): imports_of(path) for path in INSIDE}
    while below:
        ends = {name for name, others in below.items() if not others & (below.keys() - {name})}
        assert ends, f"a circle among {', '.join(sorted(below))}"
        below = {name: others for name, others in below.items() if name not in ends}


def test_the_root_is_small() -> None:
    """A room is a folder; what stands at the root is few."""
    assert len(list(SOURCE.glob("*.py"))) <= 8


def test_the_test_sees_imports() -> None:
    """The reader of imports finds those that are known to be there, also inside functions."""
    assert {"run.lock", "config.settings", "errors"} <= imports_of(SOURCE / "run" / "folder.py")
    assert "inference.text_generation" in imports_of(SOURCE / "cli" / "sample.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_are_documented(path: Path) -> None:
    """Every public module, class, function and method has a docstring, but for an overload.

    The class describes `forward`, in models/lecture.py also `logits`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: class {node.name}"
        elif not isinstance(node, ast.Module):
            continue
        for child in node.body:
            if not isinstance(child, ast.FunctionDef) or child.name.startswith("_"):
                continue
            overloads = "overload" in map(ast.unparse, child.decorator_list)
            described = ("forward", "logits") if path.name == "lecture.py" else ("forward",)
            if not overloads and child.name not in described:
                assert ast.get_docstring(child), f"{path.name}: {child.name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_code_from_a_file(path: Path) -> None:
    """No pickle, no torch.load, no eval or exec, no remote code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "shelve", "marshal", "dill", "joblib"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "__import__"), f"{path.name}: {called}"
            assert not any(k.arg in ("trust_remote_code", "allow_pickle") for k in node.keywords)
