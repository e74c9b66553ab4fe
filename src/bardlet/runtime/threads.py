"""Work items side by side on a CPU, each with its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")

Result = TypeVar("Result")

THREADS = 4
"""Pieces of work at a time: Python itself runs in one thread only."""


def run_in_threads(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device,
                 most: int = THREADS) -> Generator[Result, None, None]:
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
