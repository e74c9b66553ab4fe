"""Who may import whom: the layers of the design, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bardlet"

LAYERS = [  # a file imports only from rows above its own; inside a package siblings may be imported
    ["errors"],
    ["files", "heartbeat", "signals"],
    ["config", "dist", "reading", "tokenizer", "models.layers", "models.decoding",
     "models.cross_entropy", "ngram", "kept", "lock"],
    ["corpus", "loss", "models", "repeats", "toml"],
    ["survey", "parallel", "examples"],
    ["data", "optim", "hf", "checkpoint", "generate", "search"],
    ["evaluate", "report", "writing", "diagnosis", "pairs", "translate", "tasks"],
    ["train"],
    ["clock", "memory"],
    ["budget", "doctor", "accuracy"],
    ["pretrain", "harness"],
    ["translation"],
    ["ladder"],
    ["align"],
    ["cli"],
]
# checkpoint.py is the run folder around the Hugging Face folder of hf.py; decoding.py reads the cache of layers.py
SAME_ROW = {("checkpoint", "hf"), ("models.decoding", "models.layers")}
FORBIDDEN = {"models": {"dist", "data", "optim", "checkpoint", "hf"},
             "generate": {"checkpoint", "data", "tokenizer", "hf"},
             "search": {"checkpoint", "data", "tokenizer", "hf"}}


def name_of(path: Path) -> str:
    """The dotted name below bardlet of a source file."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def row_of(name: str) -> int:
    """The row of LAYERS that `name` stands in, the longest match first."""
    for key in (name, name.split(".")[0]):
        for row, members in enumerate(LAYERS):
            if key in members:
                return row
    raise AssertionError(f"{name} stands in no layer: add it to the table of the design and of this test")


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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_from_rows_above(path: Path) -> None:
    """No file imports from its own row or from below, except siblings in a package."""
    me = name_of(path)
    package = me.split(".")[0]
    for other in imports_of(path):
        if other.split(".")[0] == package and (SOURCE / package).is_dir():
            continue
        assert row_of(other) < row_of(me) or (me, other) in SAME_ROW, f"{me} imports {other}"
        assert other.split(".")[0] not in FORBIDDEN.get(package, set()), f"{me} imports {other}"


def test_the_test_sees_imports() -> None:
    """The reader of imports finds those that are known to be there, also inside functions."""
    assert {"hf", "config", "errors"} <= imports_of(SOURCE / "checkpoint.py")
    assert "writing" in imports_of(SOURCE / "cli" / "sample.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_are_documented(path: Path) -> None:
    """Every public module, class, function and method has a docstring; `forward` is what its class describes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: class {node.name}"
        elif not isinstance(node, ast.Module):
            continue
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and child.name != "forward":
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
