"""Time and memory of the head and its loss: PyTorch with all logits at once, and `linear_cross_entropy`.

    python benchmarks/head.py [--runs 9] [--no-save]

Forward and backward pass on random hidden states and targets, at several sizes, with products in bf16 and in fp32. The
two sides alternate; times are medians in milliseconds. Memory is the growth of a fresh process over three passes, in
MiB. Appends a line per size and precision to results/head.jsonl.
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
"""(tokens per step, channels, vocabulary size)."""
DTYPES = ("bf16", "fp32")


def by_all_logits(x_NC: Tensor, weight_VC: Tensor, target_N: Tensor) -> Tensor:
    """Return the loss as usually written, with all logits at once."""
    return F.cross_entropy(F.linear(x_NC, weight_VC).float(), target_N, reduction="sum")


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits": by_all_logits, "bardlet": linear_cross_entropy}  # fmt: skip


def make_pass(size: tuple[int, int, int], dtype: str) -> Callable[[str], None]:
    """Return a function that runs one forward and backward pass of a side."""
    N, C, V = size
    device.set_threads_and_determinism(None, False, torch.device("cpu"))
    torch.manual_seed(0)
    x_NC, weight_VC = (torch.randn(rows, C).mul(C**-0.5).requires_grad_() for rows in (N, V))
    target_N = torch.randint(V, (N,))

    def run_pass(side: str) -> None:
        x_NC.grad = weight_VC.grad = None
        with device.autocast(dtype, torch.device("cpu")):
            total = SIDES[side](x_NC, weight_VC, target_N)
        (total / N).backward()

    return run_pass


def memory_growth(side: str, size: tuple[int, int, int], dtype: str) -> int:
    """Return the MiB that this process grows by in three passes."""
    run_pass = make_pass(size, dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        run_pass(side)
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def time_sides(size: tuple[int, int, int], dtype: str, runs: int) -> dict[str, float]:
    """Return the median milliseconds of a pass, per side."""
    run_pass = make_pass(size, dtype)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs + 1):
        for side in SIDES:
            started = time.perf_counter()
            run_pass(side)
            times[side].append(1000 * (time.perf_counter() - started))
    return {side: round(statistics.median(milliseconds[1:]), 1) for side, milliseconds in times.items()}


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed passes per side")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    cases = list(itertools.product(SIZES, DTYPES))
    # before timing: a new process inherits the peak memory of its parent
    memory = [{side: in_new_process(memory_growth, side, *case) for side in SIDES} for case in cases]
    for (size, dtype), grown_mib in zip(cases, memory, strict=True):
        figures = {"tokens": size[0], "channels": size[1], "vocabulary": size[2], "dtype": dtype, "runs": args.runs,
                   "milliseconds": time_sides(size, dtype, args.runs), "grown_mib": grown_mib}
        print(figures, flush=True)
        if not args.no_save:
            record.append("head", figures)


def in_new_process(function: Callable[..., int], *arguments: object) -> int:
    """Call `function` in a new process, and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    main()
