"""Device, precision and threads of a process, and the name of its processor."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bardlet.errors import BardletError

log = logging.getLogger("bardlet")


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is the first GPU, else the CPU. A device that is not there is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("bardlet computes on cpu, cuda or mps")
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BardletError(f"--device {name}: not to be had on this machine ({why}); take --device cpu") from None
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """fp32 or bf16: auto is bf16 where the processor multiplies matrices in it natively.

    A notice, once, where somebody asks a CPU for bf16 that has to emulate it.
    """
    if name != "auto":
        if name == "bf16" and device.type == "cpu" and pick_dtype("auto", device) != "bf16":
            _warn_emulated()
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if has_native_bf16() else "fp32"


def has_native_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices natively and no variable forbids it.

    `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2` make a processor compute as one with AVX2 alone, which has
    to emulate bf16 (docs.pytorch.org, "ATen CPU capability"; oneDNN, "CPU Dispatcher Control").
    """
    return _supports_bf16() and not instruction_limit()


def instruction_limit() -> str:
    """Return the variable that keeps this process from the native bf16 of its CPU, as NAME=VALUE; empty: none does."""
    onednn = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
    limits = {"ATEN_CPU_CAPABILITY": ("default", "avx2"), "ONEDNN_MAX_CPU_ISA": onednn, "DNNL_MAX_CPU_ISA": onednn}
    for name, without in limits.items():
        value = os.environ.get(name, "")
        known = value if name.startswith("ATEN") else value.lower()  # PyTorch knows its values in lower case alone
        if known in without and _supports_bf16():
            return f"{name}={value}"
    return ""


def _supports_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def place(model: torch.nn.Module, device: str, dtype: str) -> torch.device:
    """Move a model that is to be used, not trained, to a device, its weights in a dtype; both as the options say."""
    where = pick_device(device)
    model.to(where)
    if pick_dtype(dtype, where) == "bf16":
        model.bfloat16()
    return where


@cache
def _warn_emulated() -> None:
    log.warning("bf16: this processor has to emulate it, which takes several times as long as fp32; "
                "leave --dtype out, or say --dtype fp32")


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which matrix products are computed in `dtype` (fp32 or bf16); weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def set_threads_and_determinism(threads: int | None, deterministic: bool, device: torch.device) -> int:
    """Pin the number of CPU threads and choose deterministic algorithms (always on a CPU). Returns the threads."""
    if device.type == "cpu":
        tune_malloc()
    if threads:
        torch.set_num_threads(threads)
    if deterministic:  # what cuBLAS wants to see before it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # the same switch as use_deterministic_algorithms, which imports the compiler (a second) whether it is used or not
    torch.set_deterministic_debug_mode("error" if deterministic or device.type == "cpu" else "default")
    # filling new memory with NaN is for finding bugs; without it the deterministic algorithms cost nothing on a CPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.get_num_threads()


def tune_malloc() -> None:
    """Have the C library keep memory that is freed, for the next step, instead of giving it back each time.

    A training step frees all its activations and asks for them again. By default glibc returns large blocks to the
    system, which hands them out as new pages, each cleared and entered at its first touch: that took an eighth of a
    step of 1.8 M parameters and a quarter of one of 0.8 M. With another C library nothing changes.
    """
    trim_threshold, mmap_max = -1, -4  # of glibc's malloc.h
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, -1)


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    limit = instruction_limit()
    return f"{name} with {limit}" if limit else name
