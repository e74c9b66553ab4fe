"""One process or many: how a model is wrapped, and what processes tell each other.

A model knows nothing of this file. `wrap` puts it into DistributedDataParallel from outside, and the training
step takes its slice of a global batch that every rank can compute, so that two processes do what one does.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import nn

from bardlet import __version__
from bardlet.errors import BardletError, one_line
from bardlet.runtime import heartbeat
from bardlet.runtime.device import pick_device, processor

log = logging.getLogger("bardlet")


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

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on this process's device; to a GPU it travels from pinned memory, and nobody waits for it."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all processes, in each of them."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def broadcast_int(self, value: int) -> int:
        """Rank 0's `value`, in each process: for decisions that must not differ (a clock's, a signal's)."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(box, src=0)
        return int(box.item())

    def all_max(self, value: int) -> int:
        """The largest `value` of all processes, in each of them."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box.item())

    def all_min(self, value: int) -> int:
        """The smallest `value` of all processes, in each of them."""
        return -self.all_max(-value)

    def ranks_where(self, here: bool) -> list[int]:
        """The ranks of the processes in which `here` is true, in each of them."""
        flags = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        flags[self.rank] = int(here)
        return [int(rank) for rank in self.sum(flags).nonzero().flatten()]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What is inside is done by rank 0, and then by the others: they find what it has made."""
        if not self.main:
            self.broadcast_int(0)
        yield
        if self.main:
            self.broadcast_int(0)

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
        why = f"process {rank} of {world} cannot reach the others ({one_line(error)})"
        raise BardletError(f"{why}; start all of them again") from None
    heart = heartbeat.Heartbeat(rank, world)
    heart.start()
    try:
        yield Dist(rank, world, where)
    except BaseException as error:
        with suppress(ValueError):  # a launcher that has seen another one end asks this one to end, too: it will
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "alarm"):  # a process group with an unfinished collective may hang at exit
            signal.alarm(int(3 * heartbeat.SILENT_SECONDS))
        if heartbeat.is_peer_failure(error):
            heart.wait(2 * heartbeat.SILENT_SECONDS)
        elif isinstance(error, KeyboardInterrupt):  # perhaps from such a launcher
            heart.wait(heartbeat.BRIEF_SECONDS + 1)
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


def machine(dist: Dist, dtype: str, threads: int) -> dict[str, Any]:
    """What a bit-for-bit repetition of a run depends on, besides its settings; nothing is compiled yet."""
    gpu = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else None
    return {"processor": gpu or processor(), "torch": torch.__version__, "device": dist.device.type, "dtype": dtype,
            "compiled": False, "compiler": "", "threads": threads, "processes": dist.world,
            "bardlet": __version__}
