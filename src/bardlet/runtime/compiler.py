"""torch.compile for the blocks of a model, and its requirements on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn


def compiler_missing(device: torch.device) -> str | None:
    """Return why torch.compile cannot work on this machine; None if it can."""
    if device.type == "cuda" and sys.platform == "win32":
        return None  # Triton for Windows brings its own compiler
    if device.type == "cuda":  # Triton builds a launcher in C, with $CC only if it is set
        language, names = "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        language, names = "C++", [cxx()]
    if not any(map(shutil.which, names)):
        return f"no {language} compiler ({names[0]}) on this machine"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the Python headers (Python.h) are not installed"
    return None


def cxx() -> str:
    """Return the C++ compiler that torch.compile runs: it tries no other one."""
    return os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")


def remedy() -> str:
    """Return how to install what `compiler_missing` misses."""
    if sys.platform == "win32":
        return ("install the Build Tools for Visual Studio (Desktop development with C++), and run bardlet in their "
                "Developer Command Prompt, where cl is on the PATH")
    return "xcode-select --install" if sys.platform == "darwin" else "Debian, Ubuntu: apt install g++ python3-dev"


def try_compiler(device: torch.device) -> None:
    """Compile and run a small function on a device. Raise whatever error torch.compile raises."""
    torch.compile(lambda x: torch.tanh(x) + 1)(torch.ones(8, device=device))


def compile_blocks(model: nn.Module, on: bool = True, widths: bool = False) -> None:
    """Have torch.compile compile the blocks of `model` as one graph that all of them share, or undo that.

    On a GPU it also fuses the operations between head and loss. (On a CPU, whose cache holds a chunk of logits, that
    was not measured.) A list inside a block (its heads) is part of the block's graph and is not compiled separately.

    Args:
        model: the raw model.
        on: compile; False: undo it.
        widths: batches vary in size, and one graph has to serve them all.
    """
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler, too
    if on and widths:
        from torch.fx.experimental import _config as shapes

        # otherwise sizes that are equal in the first batch are assumed equal in every batch: a later batch recompiles,
        # and does so at another step in a resumed run
        shapes.use_duck_shape = False
    for block in blocks(model):
        if on:
            block.compile(dynamic=widths)
        else:
            block._compiled_call_impl = None
    for module in cast(Iterable[Any], model.modules()):
        if hasattr(module, "compiles_loss"):
            module.compiles_loss = on and next(module.parameters()).is_cuda


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run eagerly: compiling again for other shapes costs more than it gains.
    """
    compiled = any(block._compiled_call_impl is not None for block in blocks(model))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost module lists of `module`."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def compiler(device: torch.device) -> str:
    """Return the first line of the C++ compiler's version message; empty if there is none, or on a GPU."""
    if device.type == "cuda":
        return ""
    program = cxx()
    arguments = [] if sys.platform == "win32" and Path(program).stem == "cl" else ["--version"]
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return ((done.stdout if arguments else done.stderr).splitlines() or [""])[0]  # cl names itself on standard error
