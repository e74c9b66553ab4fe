"""Devices: the requirements of the compiler, native bf16, and the GPU of each rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from bardlet import doctor
from bardlet.errors import BardletError
from bardlet.runtime import compiler, distributed
from bardlet.runtime import device as runtime_device


@pytest.mark.skipif(os.name == "nt", reason="there Triton brings a compiler")
@pytest.mark.parametrize(("device", "installed", "variables", "missing"), [
    ("cuda", "gcc", {}, None), ("cuda", "clang", {}, None), ("cuda", "icx", {"CC": "icx"}, None),
    ("cuda", "g++", {}, "no C compiler (gcc) on this machine"),
    ("cuda", "gcc", {"CC": "icx"}, "no C compiler (icx) on this machine"),
    ("cpu", "g++", {}, None), ("cpu", "clang++", {"CXX": "icpx"}, None),
    ("cpu", "gcc", {}, "no C++ compiler (g++) on this machine"),
])  # fmt: skip
def test_compiler_requirements(device: str, installed: str, variables: dict[str, str], missing: str | None,
                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler and the Python headers; for Triton's launchers a C compiler, only $CC if it is set."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == installed else None)
    monkeypatch.setattr(compiler.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    headers = "the Python headers (Python.h) are not installed"
    assert compiler.compiler_missing(torch.device(device)) == (missing or headers)
    (tmp_path / "Python.h").touch()
    assert compiler.compiler_missing(torch.device(device)) == missing


@pytest.mark.parametrize(("variable", "value", "native"), [
    ("ATEN_CPU_CAPABILITY", "avx2", False), ("ATEN_CPU_CAPABILITY", "default", False),
    ("ATEN_CPU_CAPABILITY", "avx512", True), ("ATEN_CPU_CAPABILITY", "AVX2", True),
    ("DNNL_MAX_CPU_ISA", "avx2", False), ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
    ("ONEDNN_MAX_CPU_ISA", "avx512_core_vnni", False), ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True),
    ("ONEDNN_MAX_CPU_ISA", "ALL", True), ("MKL_ENABLE_INSTRUCTIONS", "AVX2", True),
])  # fmt: skip
def test_an_instruction_limit_disables_bf16(variable: str, value: str, native: bool,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is not native if a variable keeps PyTorch or oneDNN from using it; the processor's name has the variable."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime_device.pick_dtype("auto", torch.device("cpu")) == "bf16"
    monkeypatch.setenv(variable, value)
    assert runtime_device.pick_dtype("auto", torch.device("cpu")) == ("bf16" if native else "fp32")
    assert runtime_device.processor().endswith(f" with {variable}={value}") == (not native)
    messages = [finding.message for finding in doctor.machine() if finding.about == "precision"]
    assert messages == (["bf16, which this processor supports natively"] if native else
                        [f"fp32: {variable}={value} disables native bf16"])


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_a_rank_opens_its_own_gpu_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank selects its GPU before it creates a tensor. Here the other ranks are missing, so `connect` fails."""
    calls: list[str] = []

    def use(name: str) -> torch.device:
        calls.append(f"use {name}")
        return torch.device(name)

    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.append(f"set {number}"))
    monkeypatch.setattr(distributed, "pick_device", use)

    def alone(backend: str, rank: int, world: int) -> None:
        calls.append(backend)
        raise RuntimeError("no peers")

    monkeypatch.setattr(distributed, "_join", alone)
    with pytest.raises(BardletError, match="process 1 of 2 cannot reach the others"), distributed.connect(device):
        pass
    assert calls == (["use cpu", "gloo"] if device == "cpu" else ["set 1", "use cuda:1", "nccl"])
