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

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Options of glibc's allocator, from its malloc.h."""

PRODUCTS_KEPT = 128
"""Shapes of products whose compiled code oneDNN keeps, in place of 1,024: with batches whose widths keep changing, a
thousand took 1.1 GB."""


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; auto is the first GPU, else the CPU. Raise BardletError if it is unavailable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise BardletError(f"--device {name}: no such device; use --device cpu, or --device cuda for an NVIDIA GPU")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BardletError(f"--device {name}: not available on this machine ({why}); use --device cpu") from None
    return device


def accelerators() -> list[torch.device]:
    """Return the GPUs of this machine that PyTorch can use, one of each kind."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [torch.device(name) for name, there in present.items() if there]


def pick_dtype(name: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; auto is bf16 if the processor multiplies bf16 matrices natively.

    If an NVIDIA GPU does not, auto is fp16 where it has tensor cores, Volta's and Turing's. Warns once if the user asks
    for bf16 or fp16 on a CPU that emulates it.
    """
    if name != "auto":
        if name in HALF and device.type == "cpu" and pick_dtype("auto", device) != name:
            _warn_emulated(name)
        return name
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if has_native_bf16() else "fp32"


def has_native_bf16() -> bool:
    """Return True if this CPU multiplies bf16 matrices natively and no environment variable forbids it.

    `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2` limit a CPU to AVX2, which has to emulate bf16
    (docs.pytorch.org, "ATen CPU capability"; oneDNN, "CPU Dispatcher Control").
    """
    return _supports_bf16() and not instruction_limit()


def instruction_limit() -> str:
    """Return the environment variable that disables this CPU's native bf16, as NAME=VALUE; empty if none does."""
    onednn = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
    limits = {"ATEN_CPU_CAPABILITY": ("default", "avx2"), "ONEDNN_MAX_CPU_ISA": onednn, "DNNL_MAX_CPU_ISA": onednn}
    for name, without in limits.items():
        value = os.environ.get(name, "")
        level = value if name.startswith("ATEN") else value.lower()  # PyTorch accepts lower case only
        if level in without and _supports_bf16():
            return f"{name}={value}"
    return ""


def _supports_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def place(model: torch.nn.Module, device: str, dtype: str) -> torch.device:
    """Move a model for inference to a device, with its weights in a dtype (both named as in the options)."""
    target = pick_device(device)
    model.to(target)
    if dtype == "bf16":
        model.bfloat16()
        if not hasattr(model, "new_cache"):  # others generate with products that no processor has to emulate
            pick_dtype(dtype, target)
    return target


@cache
def _warn_emulated(name: str) -> None:
    log.warning("%s: this processor emulates it, which is several times slower than fp32; "
                "drop --dtype, or use --dtype fp32", name)


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of products below fp32."""


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that computes matrix products in `dtype` (fp32, bf16 or fp16); weights stay float32."""
    return torch.autocast(device.type, HALF[dtype]) if dtype in HALF else nullcontext()


def set_threads_and_determinism(threads: int | None, deterministic: bool, device: torch.device) -> int:
    """Set the number of CPU threads and, if asked or on a CPU, deterministic algorithms; return the number of threads.
    """
    if device.type == "cpu":
        tune_malloc()
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the second is PyTorch's own
            os.environ.setdefault(cache, str(PRODUCTS_KEPT))
    if threads:
        torch.set_num_threads(threads)
    if deterministic:  # cuBLAS reads it once, at its start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # the same switch as use_deterministic_algorithms, but that imports the compiler (a second) even if it is not used
    torch.set_deterministic_debug_mode("error" if deterministic or device.type == "cpu" else "default")
    # filling new memory with NaN only helps debugging; without it, deterministic algorithms cost nothing on a CPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.get_num_threads()


def tune_malloc() -> None:
    """Have glibc keep freed memory for the next step instead of returning it to the system.

    A training step frees all its activations and allocates them again. By default glibc returns large blocks to the
    system, which hands them out as new pages; it clears and maps each on first touch. That took an eighth of a step of
    1.8 M parameters, and a quarter of one of 0.8 M. With another C library this does nothing.
    """
    _set_malloc({MMAP_MAX: 0, TRIM_THRESHOLD: -1})


def return_large_blocks() -> None:
    """Have glibc return blocks of a megabyte or more to the system as soon as they are freed.

    A sharded model gathers the weights of a block and frees them, again and again. In a heap that grows, the
    activations in between take part of the freed space, and the next block's weights do not fit into the rest: after
    one step, a process had as much memory as for the whole model. With another C library this does nothing.
    """
    _set_malloc({MMAP_MAX: 65536, MMAP_THRESHOLD: 1 << 20})


def _set_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's allocator; do nothing with another C library."""
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            for option, value in options.items():
                libc.mallopt(option, value)


def processor() -> str:
    """Return the name of the CPU as the system reports it, with the variable that limits its instructions, if any."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    limit = instruction_limit()
    return f"{name} with {limit}" if limit else name
