"""Parallel work on a CPU: a few threads, each with its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")

Result = TypeVar("Result")

THREADS = 4
"""The default maximum number of threads: Python itself runs in one thread at a time."""


def shares(items: Sequence[Item], device: torch.device) -> list[Sequence[Item]]:
    """Return the items in as many equal shares as `run_in_threads` has threads, dealt out in turn; none is empty."""
    workers = min(len(items), torch.get_num_threads(), THREADS) if device.type == "cpu" else min(1, len(items))
    return [items[first::workers] for first in range(workers)]


def run_in_threads(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device,
                   max_threads: int = THREADS) -> Generator[Result, None, None]:
    """Yield work(item) for each item, in order; on a CPU, in up to `max_threads` threads that share the cores.

    Most operations of a small model are too small for several cores, and its matrix products gain little from a second
    one. So two batches in parallel, on one core each, take less time than one after the other on both cores. Close the
    generator before changing anything that `work` uses: that waits for the items in progress.
    """
    cores = torch.get_num_threads()
    workers = min(len(items), cores, max_threads) if device.type == "cpu" else 1
    if workers < 2:
        yield from map(work, items)
        return
    shares = iter([cores // workers + (i < cores % workers) for i in range(workers)])

    def take_share() -> None:
        torch.get_num_threads()  # the first call in a thread adopts the number that any thread set last
        torch.set_num_threads(next(shares))

    pool = ThreadPoolExecutor(workers, initializer=take_share)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # later threads start with the number that was set last
