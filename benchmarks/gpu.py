"""One GPU in one command: tokens/s and MFU at 124 M, seconds to a loss, generation. `bash benchmarks/gpu.sh` runs it.

    bash benchmarks/gpu.sh [--nanogpt PATH] [--out FILE.json] [--part NAME ...] [--toy]

Parts: `throughput` trains gpt2 and qwen3 of 124 M parameters on random tokens at context 1,024 (beside nanoGPT's model,
taken from PATH, with its own optimizer); `loss` trains a 10.7 M qwen3 on Tiny Shakespeare until its validation loss by
protocol (b) is 1.4697 or lower, what nanoGPT's recipe ends at; `generation` is 10.65 M at batch 1 and 16. Each writes
its figures into FILE (default: gpu.json in $OUT, or here) as soon as it has them: a run that is cut off keeps them.
All of it takes less than 10 minutes. --toy is the same code at a size that a CPU manages: to see that it works.

MFU counts what nanoGPT counts: 6 N + 12 L C T flops a token (PaLM, appendix B; N without position embeddings),
over the peak of the card where that is known, and over the rate of a large bf16 product measured beside it.

It needs bardlet's models and training step, torch and numpy: no tokenizers, no downloads but the text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bardlet import dist as distributed
from bardlet import generate, loss, models, optim
from bardlet.config import TrainConfig
from bardlet.data import Windows, validation_windows
from bardlet.dist import Dist
from bardlet.evaluate import mean_loss
from bardlet.loss import Batch
from bardlet.train import Stage, seed_step, train_step

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 flops per second from the makers' data sheets, by a part of the card's name."""
TARGET = 1.4697
"""Validation loss of nanoGPT's GPU recipe (its README)."""
PARTS = ("throughput", "loss", "generation")


def arguments() -> argparse.Namespace:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT, measured beside")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.json")
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare's input.txt; default: below $BARDLET_DATA")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, any device")
    options = parser.parse_args()
    if options.nanogpt and not (options.nanogpt / "model.py").exists():
        raise SystemExit(f"{options.nanogpt}: is no checkout of nanoGPT; give a folder that holds its model.py")
    return options


# ---------------------------------------------------------------- timing


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], device: torch.device, warm: int, count: int) -> list[float]:
    """Seconds of each of `count` calls, after `warm` ones that are not counted."""
    times = []
    for i in range(warm + count):
        wait(device)
        begun = time.perf_counter()
        step()
        wait(device)
        if i >= warm:
            times.append(time.perf_counter() - begun)
    return times


def matrix_rate(device: torch.device, n: int) -> float:
    """Flops per second of a bf16 product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, device, 3, 10))


def peak(device: torch.device) -> float | None:
    """What the card's maker promises, where that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def speed(times: list[float], tokens: int, flops_per_token: float, rate: float, device: torch.device) -> dict[str, Any]:
    """Figures of a training step of so many tokens."""
    per_second = tokens / statistics.median(times)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    known = peak(device)
    return {"tokens_per_second": per_second, "mfu": per_second * flops_per_token / known if known else None,
            "share_of_measured_rate": per_second * flops_per_token / rate, "step_ms": 1000 * statistics.median(times),
            "steps": len(times), "tokens_per_step": tokens, "memory_gib": memory}


def next_token_stage() -> Stage:
    """Training alone: batches come from elsewhere, nothing is evaluated."""
    return Stage(lambda step: {}, loss.next_token, loss.count_targets, lambda model: float("nan"))


# ---------------------------------------------------------------- throughput


def throughput(device: torch.device, toy: bool, nanogpt: Path | None) -> dict[str, Any]:
    """Training steps of 124 M models on random tokens, each compiled, bf16."""
    size: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32}
    vocabulary, warm, count = 50_304, 5, 20
    if toy:
        size |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
        vocabulary, warm, count = 256, 1, 2
    T, B = size["block_size"], size["batch_size"]
    rate = matrix_rate(device, 1024 if toy else 8192)
    figures: dict[str, Any] = {"bf16_product_flops": rate, "peak_flops": peak(device), "size": size}
    tokens = torch.randint(vocabulary, (B, T + 1))
    batch = {"idx": tokens[:, :-1].contiguous(), "target": tokens[:, 1:].contiguous()}
    steps = {"gpt2": lambda: our_step("gpt2", size, vocabulary, batch, device, toy),
             "qwen3": lambda: our_step("qwen3", size, vocabulary, batch, device, toy)}
    if nanogpt:
        steps["nanoGPT"] = lambda: nanogpt_step(nanogpt, size, vocabulary, batch, device, toy)
    for name, make in steps.items():
        reset_memory(device)
        step, parameters = make()
        times = timed(step, device, warm, count)
        positions = 0 if name == "qwen3" else T * size["n_embd"]
        per_token = 6 * (parameters - positions) + 12 * size["n_layer"] * size["n_embd"] * T
        figures[name] = {"parameters": parameters, **speed(times, B * T, per_token, rate, device)}
        print(name, json.dumps(figures[name]))
        del step
        torch.compiler.reset()
    return figures


def our_step(name: str, size: dict[str, Any], vocabulary: int, batch: Batch, device: torch.device,
             toy: bool) -> tuple[Callable[[], Any], int]:
    """(a training step of bardlet with AdamW, as nanoGPT has it; the model's parameters)."""
    config = TrainConfig(model=name, optimizer="adamw", lr=6e-4, **size)
    torch.manual_seed(0)
    model = models.build(config.model_config(vocabulary)).to(device)
    distributed.compile_blocks(model, on=not toy)
    optimizers, stage, here = optim.build(model, config), next_token_stage(), Dist(0, 1, device)
    return (lambda: train_step(model, optimizers, batch, stage, config, here, "bf16"),
            sum(p.numel() for p in model.parameters()))


def reset_memory(device: torch.device) -> None:
    """Count the peak of memory from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def nanogpt_step(path: Path, size: dict[str, Any], vocabulary: int, batch: Batch, device: torch.device,
                 toy: bool) -> tuple[Callable[[], Any], int]:
    """(the same step as its train.py makes it, compiled as a whole and clipped at 1; the model's parameters)."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    assert spec and spec.loader, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    shape = {name: size[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    model = module.GPT(module.GPTConfig(vocab_size=vocabulary, dropout=0.0, bias=False, **shape)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    run = model if toy else torch.compile(model)
    x, y = batch["idx"].to(device), batch["target"].to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            _, value = run(x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- seconds to a loss


def to_loss(device: torch.device, toy: bool, text: Path | None) -> dict[str, Any]:
    """Train a qwen3 of 10.7 M parameters on the training part; look at the validation loss on the way."""
    found = text or Path(os.environ.get("BARDLET_DATA", ".")) / "tinyshakespeare" / "input.txt"
    if not found.exists():
        raise SystemExit(f"{found}: there is no Tiny Shakespeare; name its file with --text")
    whole = found.read_text(encoding="utf-8")
    place = {c: i for i, c in enumerate(sorted(set(whole)))}
    tokens = np.array([place[c] for c in whole], dtype=np.uint16)
    cut = int(0.9 * len(tokens))
    size: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "steps": 800}
    if toy:
        size |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "steps": 4}
    config = TrainConfig(dropout=0.2, lr=2e-3, muon_lr=2e-2, weight_decay=0.1, **size)
    steps, every = size["steps"], max(1, size["steps"] // 40)
    torch.manual_seed(config.seed)
    model = models.build(config.model_config(len(place))).to(device)
    distributed.compile_blocks(model, on=not toy)
    optimizers, here, stage = optim.build(model, config), Dist(0, 1, device), next_token_stage()
    windows = Windows(tokens[:cut], config.block_size, config.batch_size, config.seed)
    look_at = validation_windows(tokens[cut:] if not toy else tokens[cut : cut + 100], min(256, config.block_size))
    seconds, compiling, curve, reached = 0.0, 0.0, [], None
    for step in range(steps):
        optim.set_learning_rate(optimizers, optim.learning_rate(step, steps, config))
        seed_step(config.seed, step, 0)
        idx, target = windows.batch(step)
        wait(device)
        begun = time.perf_counter()
        train_step(model, optimizers, {"idx": idx, "target": target}, stage, config, here, "bf16")
        wait(device)
        spent = time.perf_counter() - begun
        if step < 2:  # forwards and backwards of the first step, and what the second finds changed
            compiling += spent
        else:
            seconds += spent
        if (step + 1) % every == 0:
            value = validation(model, look_at, device)
            curve.append([step + 1, seconds, value])
            if reached is None and value <= TARGET:
                reached = seconds
    return {"target": TARGET, "seconds_to_target": reached, "compiling_seconds": compiling, "seconds": seconds,
            "last": curve[-1][2], "steps": steps, "settings": size, "curve": curve}


def validation(model: Any, windows: Any, device: torch.device) -> float:
    """Nats per character over every window once, protocol (b), in fp32, uncompiled."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        value = mean_loss(model, ({"idx": i, "target": t} for i, t in windows), device, "fp32")
    model.train()
    return value


# ---------------------------------------------------------------- generation


def generation(device: torch.device, toy: bool) -> dict[str, Any]:
    """Tokens per second of an untrained 10.65 M qwen3, 1,000 new tokens, by dtype and batch."""
    count = 8 if toy else 1000
    shape = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024}
    if toy:
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    model = models.build(TrainConfig(**shape).model_config(65)).to(device).eval()
    figures = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for batch in (1, 16):
            def write(count: int = count, dtype: torch.dtype = dtype, batch: int = batch) -> None:
                generate.generate(model, [[0]] * batch, count, temperature=1.0, seed=0, dtype=dtype)

            seconds = statistics.median(timed(write, device, 1, 1 if toy else 3))
            figures[f"{name} batch {batch}"] = batch * count / seconds
    return figures


# ---------------------------------------------------------------- all


def main() -> None:
    """Run the parts, and write what each has found as soon as it is there."""
    args = arguments()
    device = distributed.pick_device("auto")
    if device.type != "cuda" and not args.toy:
        raise SystemExit("no GPU on this machine; --toy shows on a CPU that the benchmark works")
    distributed.settle(None, False, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else distributed.processor()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__,
                              "toy": args.toy}
    begun = time.perf_counter()
    work = {"throughput": lambda: throughput(device, args.toy, args.nanogpt),
            "loss": lambda: to_loss(device, args.toy, args.text), "generation": lambda: generation(device, args.toy)}
    for part in args.part or PARTS:
        result[part] = work[part]()
        result["seconds"] = time.perf_counter() - begun
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps({k: v for k, v in result[part].items() if k != "curve"}), flush=True)
    print(f"written to {args.out} after {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
