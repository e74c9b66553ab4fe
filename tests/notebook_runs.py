"""Run a notebook from top to bottom, with other parameters."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

HANGS = 1200
"""Seconds after which a cell counts as hanging: no machine is that slow."""


def run(path: Path, folder: Path, parameters: str = "", kernel: Any = None) -> list[Any]:
    """Run a notebook; return its cells, with their outputs.

    Args:
        path: the notebook.
        folder: the working folder of the kernel.
        parameters: assignments that run after the cell with the notebook's own; each name must have a value there.
        kernel: a running kernel, whose names are deleted first; None: a kernel of its own. Importing torch takes longer
            than a tiny run.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    [own] = (k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    assert names(parameters) <= names(notebook.cells[own].source), "a parameter that the notebook does not have"
    notebook.cells.insert(own + 1, nbformat.v4.new_code_cell(parameters))
    if kernel is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = nbclient.NotebookClient(notebook, timeout=HANGS, startup_timeout=HANGS, kernel_name="python3",
                                     resources={"metadata": {"path": str(folder)}}, km=kernel)
    client.execute()
    if kernel is not None:
        client.kc.stop_channels()
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
