"""Work that the processes of a run share by taking turns, with the result of one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Interrupted

T = TypeVar("T")


@dataclass(frozen=True)
class Sharing:
    """The processes that share some work. signal: returns the number of a signal to stop it; 0: there was none."""

    dist: Dist
    signal: Callable[[], int]


_sharing: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def shared_by(dist: Dist, signal: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Have the processes share the work of `in_turn` in this context, which all of them must enter.

    It raises Interrupted(number) in all of them if one got a signal.
    """
    token = _sharing.set(Sharing(dist, signal) if dist.world > 1 else None)
    try:
        yield
    finally:
        _sharing.reset(token)


def in_turn(compute: Callable[[T], float], items: Iterator[T]) -> list[float]:
    """Return `compute` of each item, in order. Inside `shared_by`, each process computes every n-th of n."""
    if (sharing := _sharing.get()) is None:
        return [*map(compute, items)]
    dist, number, signal = sharing.dist, 0, 0
    own: list[float] = []
    while turn := list(itertools.islice(items, dist.world)):
        signal = signal or sharing.signal()
        # if none is left for a process, it computes one again: weights may be gathered from all processes
        own.append(0.0 if signal else compute(turn[min(dist.rank, len(turn) - 1)]))
        number += len(turn)
    computed = dist.gather(torch.tensor([*own, signal], dtype=torch.float64, device=dist.device)).T
    if signal := int(computed[-1].max()):
        raise Interrupted(signal)
    values: list[float] = computed[:-1].flatten()[:number].tolist()
    return values
