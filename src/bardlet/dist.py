"""Where a model computes: device, precision, threads, compiler, and one process or many.

A model knows nothing of this file. `wrap` puts it into DistributedDataParallel from outside, and the training
step takes its slice of a global batch that every rank can compute, so that two processes do what one does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from bardlet import __version__, heartbeat
from bardlet.errors import BardletError, brief

log = logging.getLogger("bardlet")

Item = TypeVar("Item")
Made = TypeVar("Made")

SIDE_BY_SIDE = 4
"""Pieces of work at a time: Python itself runs in one thread only."""


@dataclass(frozen=True)
class Dist:
    """Which of how many processes this is, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 prints and saves."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """This rank's share of `n` rows; `n` must be a multiple of the number of processes."""
        share = n // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on this process's device; to a GPU it travels from pinned memory, and nobody waits for it."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all processes, in each of them."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def from_main(self, value: int) -> int:
        """Rank 0's `value`, in each process: for decisions that must not differ (a clock's, a signal's)."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(box, src=0)
        return int(box.item())

    def most(self, value: int) -> int:
        """The largest `value` of all processes, in each of them."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box.item())

    def least(self, value: int) -> int:
        """The smallest `value` of all processes, in each of them."""
        return -self.most(-value)

    def which(self, here: bool) -> list[int]:
        """The ranks of the processes in which `here` is true, in each of them."""
        flags = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        flags[self.rank] = int(here)
        return [int(rank) for rank in self.sum(flags).nonzero().flatten()]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What is inside is done by rank 0, and then by the others: they find what it has made."""
        if not self.main:
            self.from_main(0)
        yield
        if self.main:
            self.from_main(0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, whose gradients are averaged over the processes; itself when there is one process."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def last_micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel only with the last micro-batch of a step."""
        if self.world == 1 or last:
            return nullcontext()
        return cast(nn.parallel.DistributedDataParallel, model).no_sync()


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


@contextmanager
def connect(device: str) -> Iterator[Dist]:
    """Join the process group that torchrun's environment describes, if there is one, and leave it at the end.

    Yields:
        The `Dist` of this process. With `torchrun --nproc-per-node 2` on CPUs the processes speak gloo, on GPUs NCCL.
    """
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield Dist(0, 1, pick_device(device))
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available():
        # chosen before the first tensor: else each rank leaves a context on GPU 0, some hundred MB
        local = int(os.environ["LOCAL_RANK"])
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        device = f"cuda:{local}"
    where = pick_device(device)
    backend = "nccl" if where.type == "cuda" else "gloo"
    try:
        _join(backend, rank, world)
    except RuntimeError as error:
        why = f"process {rank} of {world} cannot reach the others ({brief(error)})"
        raise BardletError(f"{why}; start all of them again") from None
    heart = heartbeat.Heartbeat(rank, world)
    heart.start()
    try:
        yield Dist(rank, world, where)
    except BaseException as error:
        with suppress(ValueError):  # a launcher that has seen another one end asks this one to end, too: it will
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "alarm"):  # a process group with an unfinished collective may hang at exit
            signal.alarm(int(3 * heartbeat.SILENT))
        if heartbeat.of_a_peer(error):
            heart.wait(2 * heartbeat.SILENT)
        elif isinstance(error, KeyboardInterrupt):  # perhaps from such a launcher
            heart.wait(heartbeat.SHORTLY + 1)
        # one that was stopped by a signal has saved with all the others, and leaves as they do
        heart.close(heartbeat.DONE if getattr(error, "exit_code", 1) > 128 else heartbeat.FAILED)
        if hasattr(signal, "alarm"):
            signal.alarm(5)
        raise
    heart.close(heartbeat.DONE)
    torch.distributed.destroy_process_group()


def _join(backend: str, rank: int, world: int) -> None:
    """Make the process group that torchrun's environment describes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store when it starts the processes again, and would tell them the addresses of the dead
        # (pytorch issue 135712); it counts its attempts for one machine only
        store = torch.distributed.PrefixStore(heartbeat.attempt(), heartbeat.store(timedelta(minutes=5)))
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        torch.distributed.init_process_group(backend)


def pick_dtype(name: str, device: torch.device) -> str:
    """fp32 or bf16: auto is bf16 where the processor multiplies matrices in it natively.

    A notice, once, where somebody asks a CPU for bf16 that has to emulate it.
    """
    if name != "auto":
        if name == "bf16" and device.type == "cpu" and pick_dtype("auto", device) != "bf16":
            _say_emulated()
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if has_native_bf16() else "fp32"


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively, and PyTorch and oneDNN are not told to do without.

    `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2` make a processor compute as one with AVX2 alone, which has
    to emulate bf16 (docs.pytorch.org, "ATen CPU capability"; oneDNN, "CPU Dispatcher Control").
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes) and not instruction_limit()


def instruction_limit() -> str:
    """The variable that keeps this process from native bf16, as NAME=VALUE; empty where none does."""
    without_bf16 = {"ATEN_CPU_CAPABILITY": ("DEFAULT", "AVX2"),
                    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE",
                                           "AVX512_CORE_VNNI")}  # fmt: skip
    set_here = ((name, os.environ.get(name, "")) for name in without_bf16)
    return next((f"{name}={value}" for name, value in set_here if value.upper() in without_bf16[name]), "")


def place(model: torch.nn.Module, device: str, dtype: str) -> torch.device:
    """Move a model that is to be used, not trained, to a device, its weights in a dtype; both as the options say."""
    where = pick_device(device)
    model.to(where)
    if pick_dtype(dtype, where) == "bf16":
        model.bfloat16()
    return where


@cache
def _say_emulated() -> None:
    log.warning("bf16: this processor has to emulate it, which takes several times as long as fp32; "
                "leave --dtype out, or say --dtype fp32")


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which matrix products are computed in `dtype` (fp32 or bf16); weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


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


def settle(threads: int | None, deterministic: bool, device: torch.device) -> int:
    """Pin the number of CPU threads and choose deterministic algorithms (always on a CPU). Returns the threads."""
    if device.type == "cpu":
        keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if deterministic:  # what cuBLAS wants to see before it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # the same switch as use_deterministic_algorithms, which imports the compiler (a second) whether it is used or not
    torch.set_deterministic_debug_mode("error" if deterministic or device.type == "cpu" else "default")
    # filling new memory with NaN is for finding bugs; without it the deterministic algorithms cost nothing on a CPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.get_num_threads()


def keep_freed_memory() -> None:
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


def side_by_side(work: Callable[[Item], Made], items: Sequence[Item], device: torch.device,
                 most: int = SIDE_BY_SIDE) -> Generator[Made, None, None]:
    """work(item) of each, in order; on a CPU of up to `most` at a time, each in a thread with its share of the cores.

    The operations of a small model are too small for more than one core, but for its products, and those gain little
    from the second: two batches at a time, a core each, take less time than one after the other on both. Close it
    before what `work` uses is changed: that waits for the pieces that have begun.
    """
    cores = torch.get_num_threads()
    workers = min(len(items), cores, most) if device.type == "cpu" else 1
    if workers < 2:
        yield from map(work, items)
        return
    shares = iter([cores // workers + (i < cores % workers) for i in range(workers)])

    def take_share() -> None:
        torch.get_num_threads()  # a thread's first look takes over the number that any thread set last
        torch.set_num_threads(next(shares))

    pool = ThreadPoolExecutor(workers, initializer=take_share)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # a thread that is made later takes the number that was set last


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


def compiler(device: torch.device) -> str:
    """The first line of what the C++ compiler says of itself; empty where it says nothing, or none is used."""
    if device.type == "cuda":
        return ""
    try:
        done = subprocess.run([os.environ.get("CXX") or "g++", "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    return (done.stdout.splitlines() or [""])[0]


def machine(dist: Dist, dtype: str, threads: int) -> dict[str, Any]:
    """What a bit-for-bit repetition of a run depends on, besides its settings; nothing is compiled yet."""
    gpu = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else None
    return {"processor": gpu or processor(), "torch": torch.__version__, "device": dist.device.type, "dtype": dtype,
            "compiled": False, "compiler": "", "threads": threads, "processes": dist.world,
            "bardlet": __version__}
