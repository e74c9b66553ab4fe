"""Run a notebook from top to bottom, with other parameters: in a kernel, or its code alone in this process."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

HANGS = 1200
"""Seconds after which a cell counts as hanging: no machine is that slow."""
OWN_TEXT = """TEXT = ["my.txt"]
PROMPT = "To be"
SETTINGS = {"steps": 10, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "compile": "off"}
"""
"""Parameters of own-text.ipynb for a run of seconds on my.txt."""


def run_code(path: Path, folder: Path, parameters: str) -> dict[str, Any]:
    """Run the code of a notebook as a script in the working folder; return its names and their values.

    A kernel would first import torch: longer than a tiny run. What cells show is missing. Figures stay open.
    """
    codes = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            codes.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                assert names(parameters) <= names(codes[-1]), "a parameter that the notebook does not have"
                codes.append(parameters)
    script = folder / f"{path.stem}.py"
    script.write_text("\n\n".join(codes), encoding="utf-8")
    return runpy.run_path(str(script), run_name="__main__")


def run(path: Path, folder: Path, parameters: str = "") -> list[Any]:
    """Run a notebook in a kernel; return its cells, with their outputs.

    Args:
        path: the notebook.
        folder: the working folder of the kernel.
        parameters: assignments that run after the cell with the notebook's own; each name must have a value there.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    [own] = (k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    assert names(parameters) <= names(notebook.cells[own].source), "a parameter that the notebook does not have"
    notebook.cells.insert(own + 1, nbformat.v4.new_code_cell(parameters))
    nbclient.NotebookClient(notebook, timeout=HANGS, startup_timeout=HANGS, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}}).execute()
    return list(notebook.cells)


def names(code: str) -> set[str]:
    """Return the names that code assigns."""
    return {target.id for node in ast.parse(code).body if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)}


def printed(cells: list[Any]) -> str:
    """Return everything that the cells printed or showed, as text."""
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text") or str(output.get("data", {}).get("text/plain", "")) for output in outputs)


def shown(cells: list[Any], kind: str) -> list[str]:
    """Return the contents of this MIME type that the cells showed."""
    return [output["data"][kind] for cell in cells for output in cell.get("outputs", ())
            if kind in output.get("data", {})]
