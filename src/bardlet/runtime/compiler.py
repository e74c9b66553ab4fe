"""torch.compile for the blocks of a model, and whether this machine has what it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, in words; None when it can."""
    if device.type == "cuda" and os.name == "nt":
        return None  # the Triton that there is for Windows brings a compiler
    if device.type == "cuda":  # it builds a launcher in C for what it compiles, by $CC alone where that is set
        language, names = "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        language, names = "C++", [os.environ.get("CXX") or ("cl" if os.name == "nt" else "g++"), "clang++"]
    if not any(map(shutil.which, names)):
        return f"no {language} compiler ({names[0]}) on this machine"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the headers of Python (Python.h) are not installed"
    return None


def compile_blocks(model: nn.Module, on: bool = True, widths: bool = False) -> None:
    """Have torch.compile translate the blocks of `model`: one graph, shared by all of them; or take that back.

    A list inside a block (its heads) is part of the block's graph, and not compiled once more. `widths`: batches have
    different sizes, which one graph is to serve.
    """
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler, too
    if on and widths:
        from torch.fx.experimental import _config as shapes

        # else lengths that are equal in the first batch are taken to be equal always: one more compilation on the way,
        # at another step where a run goes on
        shapes.use_duck_shape = False
    for block in _blocks(model):
        if on:
            block.compile(dynamic=widths)
        else:
            block._compiled_call_impl = None


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, blocks that were compiled are not: for other shapes and no gradients it would take more than it gains."""
    compiled = any(block._compiled_call_impl is not None for block in _blocks(model))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the outermost lists of `module`."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def compiler(device: torch.device) -> str:
    """The first line of what the C++ compiler says of itself; empty where it says nothing, or none is used."""
    if device.type == "cuda":
        return ""
    try:
        done = subprocess.run([os.environ.get("CXX") or "g++", "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    return (done.stdout.splitlines() or [""])[0]
