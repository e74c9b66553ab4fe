"""CPU utilization of training: model flops per second as a share of the rate of a large bf16 matrix product.

    python benchmarks/share.py [--runs 5] [--no-save]

qwen3 with the defaults of `bardlet train` (Muon, bf16, compiled), on random characters, at several sizes. Each round
times the product, then a few steps of one size; the figures are medians over the rounds. Model flops are counted as in
gpu.py: 6 N + 12 L C T per token, with attention to all positions. `causal` counts only the past: 6 N + 6 L C T. Appends
a line per size to results/share.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import gpu
import record
import torch

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.runtime import compiler, device, distributed
from bardlet.training import optim
from bardlet.training.step import train_step

SIZES = ({"n_layer": 4, "n_head": 4, "n_embd": 192, "block_size": 128, "batch_size": 32},
         {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 16},
         {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16},
         {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64})
CHARACTERS = 65


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds per size")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    device.set_threads_and_determinism(None, False, torch.device("cpu"))
    if missing := compiler.compiler_missing(torch.device("cpu")):
        raise SystemExit(missing)
    for size in SIZES:
        figures = measure(TrainConfig(**size).resolved(), args.runs)
        print(" ".join(f"{name} {value:,.3f}" if isinstance(value, float) else f"{name} {value}"
                       for name, value in figures.items()), flush=True)
        if not args.no_save:
            record.append("share", {**size, **figures})


def measure(config: TrainConfig, runs: int) -> dict[str, Any]:
    """Return tokens per second, the flops rate of the product, and the share of it, as medians over `runs` rounds."""
    cpu = torch.device("cpu")
    torch.compiler.reset()  # drop the graphs of the previous size
    torch.manual_seed(0)
    model = models.build(config.model_config(CHARACTERS))
    compiler.compile_blocks(model)
    tokens = torch.randint(CHARACTERS, (config.batch_size, config.block_size + 1))
    batch = {"idx": tokens[:, :-1].contiguous(), "target": tokens[:, 1:].contiguous()}
    optimizers, objective, dist = optim.build(model, config), gpu.next_token_objective(), distributed.Dist(0, 1, cpu)
    parameters = sum(p.numel() for p in model.parameters())
    attention = 6 * config.n_layer * config.n_embd * config.block_size
    flops = config.tokens_per_step * (6 * parameters + 2 * attention)
    rates, times = [], []
    for _ in range(runs):
        rates.append(gpu.matrix_rate(cpu, 4096))
        times.append(statistics.median(gpu.timed(
            lambda: train_step(model, optimizers, batch, objective, config, dist, "bf16"), cpu, 2, 5)))
    shares = [flops / seconds / rate for seconds, rate in zip(times, rates, strict=True)]
    return {"parameters": parameters, "tokens_per_second": config.tokens_per_step / statistics.median(times),
            "bf16_product_gflops": statistics.median(rates) / 1e9, "share": statistics.median(shares),
            "causal": statistics.median(shares) * (1 - config.tokens_per_step * attention / flops)}


if __name__ == "__main__":
    main()
