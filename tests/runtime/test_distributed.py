"""Devices: the requirements of the compiler, native bf16, and the GPU of each rank."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from bardlet import doctor, models
from bardlet.cli import main
from bardlet.config.pretraining import TrainConfig
from bardlet.errors import BardletError
from bardlet.runtime import compiler, distributed
from bardlet.runtime import device as runtime_device


@pytest.mark.parametrize(("system", "device", "installed", "variables", "missing"), [
    ("linux", "cuda", "gcc", {}, None), ("linux", "cuda", "clang", {}, None),
    ("linux", "cuda", "icx", {"CC": "icx"}, None),
    ("linux", "cuda", "g++", {}, "no C compiler (gcc) on this machine"),
    ("linux", "cuda", "gcc", {"CC": "icx"}, "no C compiler (icx) on this machine"),
    ("linux", "cpu", "g++", {}, None), ("linux", "cpu", "clang++", {"CXX": "clang++"}, None),
    ("linux", "cpu", "gcc", {}, "no C++ compiler (g++) on this machine"),
    ("linux", "cpu", "clang++", {}, "no C++ compiler (g++) on this machine"),
    ("linux", "cpu", "clang++", {"CXX": "icpx"}, "no C++ compiler (icpx) on this machine"),
    ("darwin", "cpu", "clang++", {}, None), ("darwin", "cpu", "g++", {}, "no C++ compiler (clang++) on this machine"),
    ("win32", "cpu", "cl", {}, None), ("win32", "cpu", "clang-cl", {"CXX": "clang-cl"}, None),
    ("win32", "cpu", "g++", {}, "no C++ compiler (cl) on this machine"),
    ("win32", "cpu", "clang++", {}, "no C++ compiler (cl) on this machine"),
    ("win32", "cpu", "cl", {"CXX": "icx"}, "no C++ compiler (icx) on this machine"),
])  # fmt: skip
def test_compiler_requirements(system: str, device: str, installed: str, variables: dict[str, str],
                               missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler and the Python headers; for Triton's launchers a C compiler, only $CC if it is set.

    torch.compile runs $CXX, or else the compiler of the system, and tries no other (`cpp_compiler_search` and
    `get_cpp_compiler` of torch/_inductor/cpp_builder.py).
    """
    monkeypatch.setattr(compiler, "sys", SimpleNamespace(platform=system))
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


def test_generation_in_bf16_is_not_called_slow(monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    """A decoder reads bf16 weights at memory speed on every processor; a rung of the ladder has none."""
    monkeypatch.setattr(runtime_device, "has_native_bf16", lambda: False)
    runtime_device._warn_emulated.cache_clear()
    for family, warns in (("gpt2", False), ("residual", True)):
        shape = TrainConfig(model=family, n_layer=1, n_head=1, n_embd=8, block_size=8).resolved().model_config(11)
        model = models.build(shape)
        runtime_device.place(model, "cpu", "bf16")
        assert next(model.parameters()).dtype == torch.bfloat16
        assert ("emulates" in caplog.text) == warns
    runtime_device._warn_emulated.cache_clear()


@pytest.mark.parametrize("given", [None, "7"])
def test_few_products_are_kept(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of oneDNN's compiled code, unless the user says how much."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
        if given:
            monkeypatch.setenv(name, given)
    runtime_device.set_threads_and_determinism(None, False, torch.device("cpu"))
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        assert os.environ[name] == (given or "128")


def test_windows_with_a_gpu_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton for Windows brings one."""
    monkeypatch.setattr(compiler, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiler.compiler_missing(torch.device("cuda")) is None


@pytest.mark.parametrize(("system", "program"), [("win32", "cl"), ("darwin", "clang++"), ("linux", "g++")])
def test_without_a_compiler_training_says_so_and_goes_on(system: str, program: str, text: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "sys", SimpleNamespace(platform=system))
        patch.setattr(shutil, "which", lambda name: None)
        patch.delenv("CXX", raising=False)
        argv = ["train", str(text), "--out", str(tmp_path / "run"), *TINY[:-2], "--compile", "on", "--steps", "2"]
        code = main(argv)
    output = capsys.readouterr()
    assert code == 0, output.err
    [line] = [line for line in output.err.splitlines() if "compil" in line]
    assert line == (f"note: --compile on: no C++ compiler ({program}) on this machine; continuing without compilation, "
                    "which is slower")


@pytest.mark.parametrize(("system", "hint"), [("win32", "Developer Command Prompt"), ("darwin", "xcode-select"),
                                              ("linux", "apt install g++ python3-dev")])
def test_the_remedy_fits_the_system(system: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "sys", SimpleNamespace(platform=system))
    assert hint in compiler.remedy()


def test_the_version_of_cl_is_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """cl has no --version, and prints its banner on standard error."""
    calls = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "usage: cl [ option... ]\n", "Microsoft (R) C/C++ 19.44\nC\n")

    monkeypatch.setattr(compiler, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.subprocess, "run", run)
    assert compiler.compiler(torch.device("cpu")) == "Microsoft (R) C/C++ 19.44" and calls == [["cl"]]


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
