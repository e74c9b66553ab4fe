"""Milliseconds per sampling step on the CPU, without the model: the fastest of many repetitions, and their median.

    python benchmarks/sampling.py [--rows 16] [--vocab 50257] [--threads 1] [--runs 200]

Logits are random: flat (standard normal), peaked (six times as spread), and flat in bf16. The first lines are the
floor: one exp() of all logits, and one topk() of 50.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bardlet.inference.sampling import sample_next
from bardlet.runtime.device import tune_malloc

SETTINGS = ((None, None), (None, 0.9), (None, 0.99), (50, None), (50, 0.9))
"""(top_k, top_p)."""


def milliseconds(step: Callable[[], object], runs: int) -> str:
    """Return the fastest and the median time of a step, as text."""
    times = []
    for _ in range(runs + 3):  # the first three warm up
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return f"{min(times[3:]):6.2f} ms, median {statistics.median(times[3:]):6.2f}"


@torch.inference_mode()
def main() -> None:
    """Print a line per kind of logits and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--runs", type=int, default=200, help="timed steps per line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as the commands do
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(args.rows, args.vocab, generator=generator)
    print(f"floor, exp:              {milliseconds(flat.exp, args.runs)}")
    print(f"floor, topk of 50:       {milliseconds(lambda: flat.topk(min(50, args.vocab), sorted=False), args.runs)}")
    for name, logits in (("flat", flat), ("peaked", 6 * flat), ("bf16", flat.bfloat16())):
        for k, p in SETTINGS:
            taken = milliseconds(lambda: sample_next(logits, 1.0, k, p, generator), args.runs)  # noqa: B023
            print(f"{name:7} top-k {k or '-':>3} top-p {p or '-':<5}{taken}")


if __name__ == "__main__":
    main()
