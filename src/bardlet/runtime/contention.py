"""Share of this machine that other programs take, by the scheduler's own figures. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

BUSY = 1.25
"""Factor above which a machine counts as busy."""
SAMPLES, PAUSE, GLANCES = 20, 0.01, 3
"""Readings of the run queue, seconds between them, and readings that are enough if one of them shows free cores."""


def slowdown(tasks: Path = Path("/proc/self/task")) -> float:
    """Return the factor by which waiting for a core has slowed this process since it started; 1 if it is below BUSY.

    Linux counts how long each thread ran, and how long it was ready to run but had no core. Elsewhere the load average
    per core is the estimate.
    """
    factor = _factor(tasks)
    return factor if factor >= BUSY else 1.0


def _factor(tasks: Path) -> float:
    ran = waited = 0
    with suppress(OSError, ValueError):
        for thread in tasks.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread ended
                nanoseconds = (thread / "schedstat").read_text().split()
                ran, waited = ran + int(nanoseconds[0]), waited + int(nanoseconds[1])
    if ran:
        return (ran + waited) / ran
    with suppress(AttributeError, OSError):  # Windows has no load average
        return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return 1.0


def cores_are_taken(loadavg: Path = Path("/proc/loadavg"), pause: float = PAUSE) -> bool:
    """Return True if other programs keep a core of this process busy, by the length of the run queue.

    On a quiet machine one of the first readings shows that; only a busy one is watched for SAMPLES * `pause` seconds.
    False where the length is unknown.
    """
    cores = os.cpu_count() or 1
    spare = cores - len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0

    def taken(wait: float) -> bool:
        time.sleep(wait)
        running = int(loadavg.read_text().split()[3].partition("/")[0])
        return running - 1 > spare  # one of them is this process

    try:
        return all(taken(pause / 5) for _ in range(GLANCES)) and sum(
            taken(pause) for _ in range(SAMPLES)) > 0.8 * SAMPLES
    except (OSError, ValueError, IndexError):
        return False


def choose_waiting(spins: int = 2000) -> None:
    """Set how OpenMP's threads wait for each other, by environment variables; call it before torch is imported.

    spins: rounds of the loop in which a thread waits before it sleeps, on a quiet machine.

    Spinning is fastest on a quiet machine. On a core that another process uses, a thread that spins keeps the one that
    it waits for from running, so there the threads sleep (LOG.md). GNU's OpenMP reads this once.
    """
    if "torch" in sys.modules or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    if cores_are_taken():
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = str(spins)


def describe(factor: float) -> str:
    """Return what a slowdown means, as "other programs use its cores; everything takes about 4.5 times as long"."""
    cost = f", so everything takes about {factor:.2g} times as long" if factor > 1 else ""
    return f"other programs use its cores{cost}"
