"""Where a model computes: what the compiler needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from bardlet import dist as distributed


@pytest.mark.skipif(os.name == "nt", reason="there Triton brings a compiler")
@pytest.mark.parametrize(("device", "here", "named", "said"), [
    ("cuda", "gcc", {}, None), ("cuda", "clang", {}, None), ("cuda", "icx", {"CC": "icx"}, None),
    ("cuda", "g++", {}, "no C compiler (gcc) on this machine"),
    ("cuda", "gcc", {"CC": "icx"}, "no C compiler (icx) on this machine"),
    ("cpu", "g++", {}, None), ("cpu", "clang++", {"CXX": "icpx"}, None),
    ("cpu", "gcc", {}, "no C++ compiler (g++) on this machine"),
])  # fmt: skip
def test_what_the_compiler_needs(device: str, here: str, named: dict[str, str], said: str | None, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler and Python's headers: for Triton's launchers one of C, by $CC alone where that is set."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == here else None)
    monkeypatch.setattr(distributed.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    headers = "the headers of Python (Python.h) are not installed"
    assert distributed.compiler_missing(torch.device(device)) == (said or headers)
    (tmp_path / "Python.h").touch()
    assert distributed.compiler_missing(torch.device(device)) == said
