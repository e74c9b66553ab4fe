"""Distributed training: process groups and collectives.

Each rank takes its slice of the global batch, which every rank can compute, so two processes train exactly as one does.
`runtime/parallelize.py` prepares the model for that.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch

from bardlet import __version__
from bardlet.errors import BardletError, one_line
from bardlet.runtime import heartbeat
from bardlet.runtime.device import pick_device, processor

log = logging.getLogger("bardlet")


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest time of a collective: a bound for a deadlock, since lost processes are noticed within seconds."""
STORE_TIMEOUT = timedelta(minutes=5)
"""Longest time until the store answers."""
_turns = itertools.count()
"""Numbers the uses of `Dist.main_first`, which are the same on all ranks."""


@dataclass(frozen=True)
class Dist:
    """The rank of this process, the number of processes, the device of this process, and how a step is shared.

    slices: a power of two that `world` divides: the parts of a step whose sum has the same bits on any number of
    processes (--elastic). None: each process computes one part, and DistributedDataParallel adds them.
    heart: notices lost processes; None in a process alone.
    """

    rank: int
    world: int
    device: torch.device
    slices: int | None = None
    heart: heartbeat.Heartbeat | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """True on rank 0, which prints and saves."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """Parts into which the rows of a micro-batch are cut, over all processes."""
        return self.slices or self.world

    @property
    def own_parts(self) -> range:
        """The parts that this process computes: neighbors."""
        share = self.parts // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def rows(self, n: int) -> slice:
        """Return this rank's slice of `n` rows; `n` must be a multiple of the number of processes."""
        share = n // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def add_in_pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks, a power of two of them, on every rank.

        In round k, each rank adds the sum of the 2^k ranks that its own 2^k ranks have as neighbors: a binary tree, so
        the order of the additions does not depend on the number of ranks if each starts with the sum of its own tree.
        """
        distance = 1
        while distance < self.world:
            partner, theirs = self.rank ^ distance, torch.empty_like(tensor)
            requests = [torch.distributed.isend(tensor, partner), torch.distributed.irecv(theirs, partner)]
            for request in requests:
                cast(torch.distributed.Work, request).wait()
            tensor, distance = tensor + theirs, 2 * distance
        return tensor

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """Copy `x` to this rank's device; to a GPU asynchronously, from pinned memory."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of `x` over all ranks, on every rank."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return each rank's `own` tensor, all of one shape, on every rank: (world, ...)."""
        if self.world == 1:
            return own[None]
        every = own.new_empty((self.world, *own.shape))
        torch.distributed.all_gather(list(every.unbind()), own)
        return every

    def broadcast_int(self, value: int) -> int:
        """Return rank 0's `value` on every rank: for decisions that must agree (by a clock or a signal)."""
        if self.world == 1:
            return value
        buffer = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(buffer, src=0)
        return int(buffer.item())

    def all_max(self, value: int) -> int:
        """Return the maximum of `value` over all ranks, on every rank."""
        if self.world == 1:
            return value
        buffer = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(buffer, torch.distributed.ReduceOp.MAX)
        return int(buffer.item())

    def all_min(self, value: int) -> int:
        """Return the minimum of `value` over all ranks, on every rank."""
        return -self.all_max(-value)

    def ranks_where(self, condition: bool) -> list[int]:
        """Return the ranks on which `condition` is true, on every rank."""
        flags = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        flags[self.rank] = int(condition)
        return [int(rank) for rank in self.sum(flags).nonzero().flatten()]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, then on the other ranks, which can use the files that rank 0 wrote.

        They wait through the store, which has no time limit as collectives have: rank 0 may tokenize for hours.
        """
        if self.world == 1:
            yield
            return
        key, store = f"bardlet/{heartbeat.attempt()}/first/{next(_turns)}", heartbeat.store(STORE_TIMEOUT)
        while not self.main and not store.check([key]):
            time.sleep(0.05)  # a lost rank 0 is noticed by the heartbeat
        yield
        if self.main:
            store.set(key, "")


@contextmanager
def connect(device: str, slices: int | None = None) -> Iterator[Dist]:
    """Join the process group that torchrun's environment describes, if any, and leave it at the end.

    slices: see `Dist`.

    Yields:
        The `Dist` of this process. With `torchrun --nproc-per-node 2` the backend is gloo on CPUs and NCCL on GPUs.
    """
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield Dist(0, 1, pick_device(device), slices)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if slices and slices % world:
        raise BardletError(f"--elastic {slices}: {world} processes cannot share {slices} slices equally; start 1, 2, 4 "
                           f"... or {slices}")
    if device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available():
        # before the first tensor: otherwise each rank leaves a context of some hundred MB on GPU 0
        local = int(os.environ["LOCAL_RANK"])
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        device = f"cuda:{local}"
    own_device = pick_device(device)
    backend = "nccl" if own_device.type == "cuda" else "gloo"
    try:
        _join(backend, rank, world)
    except RuntimeError as error:
        why = f"process {rank} of {world} cannot reach the others ({one_line(error)})"
        raise BardletError(f"{why}; restart all of them") from None
    heart = heartbeat.Heartbeat(rank, world)
    heart.start()
    try:
        yield Dist(rank, world, own_device, slices, heart)
    except BaseException as error:
        with suppress(ValueError):  # a launcher that saw another process end sends SIGTERM; this one ends anyway
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "alarm"):  # a process group with an unfinished collective may hang at exit
            signal.alarm(int(3 * heartbeat.SILENT_SECONDS))
        if heartbeat.is_peer_failure(error):
            heart.wait(2 * heartbeat.SILENT_SECONDS)
        elif isinstance(error, KeyboardInterrupt):  # perhaps from such a launcher
            heart.wait(heartbeat.BRIEF_SECONDS + 1)
        # a process stopped by a signal has saved together with all others, and leaves normally, as they do
        heart.close(heartbeat.DONE if getattr(error, "exit_code", 1) > 128 else heartbeat.FAILED)
        if hasattr(signal, "alarm"):
            signal.alarm(5)
        raise
    heart.close(heartbeat.DONE)
    torch.distributed.destroy_process_group()


def _join(backend: str, rank: int, world: int) -> None:
    """Initialize the process group that torchrun's environment describes."""
    if heartbeat.keeps_store():
        # after a restart, the processes would read the addresses of the dead ones (pytorch issue 135712)
        if heartbeat.on_several_machines():
            heartbeat.agree(rank, world, STORE_TIMEOUT)
        store = torch.distributed.PrefixStore(heartbeat.attempt(), heartbeat.store(STORE_TIMEOUT))
        torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, store=store, rank=rank,
                                             world_size=world)
    else:
        torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)


def machine(dist: Dist, dtype: str, threads: int) -> dict[str, Any]:
    """Return everything besides the settings that a bit-for-bit repetition depends on, before compilation."""
    gpu = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else None
    return {"processor": gpu or processor(), "torch": torch.__version__, "device": dist.device.type, "dtype": dtype,
            "compiled": False, "compiler": "", "threads": threads, "processes": dist.world,
            "bardlet": __version__}
