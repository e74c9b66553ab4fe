"""The head and its loss: all logits at once, as PyTorch has it, and `linear_cross_entropy`; time and memory.

    python benchmarks/head.py [--runs 9] [--no-save]

Random states and targets, forward and backward pass, at several sizes, products in bf16 and in fp32. The two sides take
turns; the figures are medians, in milliseconds. Memory is what a process of its own has grown by after three passes, in
MiB. Appends a line for each size to results/head.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import record
import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.ops.cross_entropy import linear_cross_entropy
from bardlet.runtime import device

SIZES = ((4096, 128, 8192), (4096, 192, 4096), (4096, 192, 65), (4096, 128, 50_257))
"""Tokens of a step, channels, vocabulary."""
DTYPES = ("bf16", "fp32")


def by_all_logits(x_NC: Tensor, weight_VC: Tensor, target_N: Tensor) -> Tensor:
    """The loss as one would write it."""
    return F.cross_entropy(F.linear(x_NC, weight_VC).float(), target_N, reduction="sum")


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits": by_all_logits, "bardlet": linear_cross_entropy}  # fmt: skip


def passes(size: tuple[int, int, int], dtype: str) -> Callable[[str], None]:
    """A function that does one forward and backward pass of a side."""
    N, C, V = size
    device.set_threads_and_determinism(None, False, torch.device("cpu"))
    torch.manual_seed(0)
    x_NC, weight_VC = (torch.randn(rows, C).mul(C**-0.5).requires_grad_() for rows in (N, V))
    target_N = torch.randint(V, (N,))

    def once(side: str) -> None:
        x_NC.grad = weight_VC.grad = None
        with device.autocast(dtype, torch.device("cpu")):
            total = SIDES[side](x_NC, weight_VC, target_N)
        (total / N).backward()

    return once


def grown(side: str, size: tuple[int, int, int], dtype: str) -> int:
    """MiB that this process grows by in three passes."""
    once = passes(size, dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        once(side)
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def timed(size: tuple[int, int, int], dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of a pass of each side, medians."""
    once = passes(size, dtype)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs + 1):
        for side in SIDES:
            begun = time.perf_counter()
            once(side)
            times[side].append(1000 * (time.perf_counter() - begun))
    return {side: round(statistics.median(some[1:]), 1) for side, some in times.items()}


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed passes of each side")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    cases = list(itertools.product(SIZES, DTYPES))
    # before anything is timed: a process begins with the peak of the one that made it
    memory = [{side: fresh(grown, side, *case) for side in SIDES} for case in cases]
    for (size, dtype), grown_mib in zip(cases, memory, strict=True):
        figures = {"tokens": size[0], "channels": size[1], "vocabulary": size[2], "dtype": dtype, "runs": args.runs,
                   "milliseconds": timed(size, dtype, args.runs), "grown_mib": grown_mib}
        print(figures, flush=True)
        if not args.no_save:
            record.append("head", figures)


def fresh(function: Callable[..., int], *given: object) -> int:
    """What `function` returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given)


if __name__ == "__main__":
    main()
