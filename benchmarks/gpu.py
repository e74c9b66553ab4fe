"""One GPU in one command: tokens/s and MFU at 124 M, seconds to a loss, generation. `bash benchmarks/gpu.sh` runs it.

    bash benchmarks/gpu.sh [--nanogpt PATH] [--text FILE] [--out FILE.json] [--part NAME ...] [--toy]

Parts: `throughput` trains gpt2 and qwen3 of 124 M parameters on random tokens at context 1,024 (beside nanoGPT's model,
taken from PATH, with its own optimizer); `loss` trains a 10.7 M qwen3 on Tiny Shakespeare and notes when its validation
loss by protocol (b) first is 1.4697 or lower, what nanoGPT's recipe ends at; `generation` is 10.65 M at batch 1 and 16.
Each writes its figures into FILE (default: gpu.json in $OUT, or here) as soon as it has them: a run that is cut off
keeps them. What fails leaves its error there, the rest goes on, and the exit code is not 0 then. A run of which nothing
has failed also appends a line to results/gpu.jsonl.

All of it is to take less than 10 minutes, which nobody has seen yet. --toy is the same code at a size that a CPU
manages, to see that it works: nothing is compiled, and no line is appended.

A step that does not fit into the card's memory is made in 2, 4, 8 ... micro-batches, nanoGPT's, too: `grad_accum`.
Where torch.compile lacks what it needs, all sides are eager: `compiler_missing` says what.

MFU counts what nanoGPT counts: 6 N + 12 L C T flops a token (PaLM, appendix B; N without position embeddings),
over the peak of the card where that is known, and over the rate of a large bf16 product measured beside it.

It needs torch, numpy, tokenizers and safetensors, which bardlet's training step imports, a C compiler and Python's
headers for torch.compile, and the text of `loss`, which it does not download.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from torch import nn

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.data.batch import Batch
from bardlet.data.windows import Windows, validation_windows
from bardlet.errors import is_out_of_memory, one_line
from bardlet.evaluation.metrics import mean_loss
from bardlet.inference import generate
from bardlet.runtime import compiler
from bardlet.runtime import device as runtime_device
from bardlet.runtime.distributed import Dist
from bardlet.training import losses, optim
from bardlet.training.state import Objective
from bardlet.training.trainer import seed_step, train_step

PEAKS = {"MIG": None, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
         "A100": 312e12, "L40S": 362e12, "RTX 4090 Laptop": None, "RTX 4090 D": 147e12, "RTX 4090": 165e12}
"""Dense bf16 flops per second from the makers' data sheets, by a part of the card's name: the first that fits counts.
None: not known, as of a slice of a card."""
TARGET = 1.4697
"""Validation loss of nanoGPT's GPU recipe (its README)."""
PARTS = ("throughput", "loss", "generation")


def arguments() -> argparse.Namespace:
    """The command line, see the top of this file, and the `device`. What is missing is said before anything begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT, measured beside")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.json")
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare's input.txt; default: below $BARDLET_DATA",
                        default=Path(os.environ.get("BARDLET_DATA", ".")) / "tinyshakespeare" / "input.txt")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, any device")
    options = parser.parse_args()
    options.part = options.part or PARTS
    options.device = runtime_device.pick_device("auto")
    if options.device.type != "cuda" and not options.toy:
        raise SystemExit("no GPU on this machine; --toy shows on a CPU that the benchmark works")
    if options.nanogpt and not (options.nanogpt / "model.py").exists():
        raise SystemExit(f"{options.nanogpt}: is no checkout of nanoGPT; give a folder that holds its model.py")
    if "loss" in options.part and not options.text.is_file():
        raise SystemExit(f"{options.text}: there is no Tiny Shakespeare; name its file with --text")
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


def next_token_objective() -> Objective:
    """Training alone: batches come from elsewhere, nothing is evaluated."""
    return Objective(lambda step: {}, losses.next_token_loss, losses.count_targets, lambda model: float("nan"))


# ---------------------------------------------------------------- what fails


def attempt(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` finds; where it fails, its error as one line: what comes after it goes on."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        print(f"{name} failed; going on", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def fitting(measure: Callable[[int], dict[str, Any]], rows: int, device: torch.device) -> dict[str, Any]:
    """What `measure` finds of a batch of so many rows, in as few micro-batches as fit into memory: 1, 2, 4 ..."""
    number = 1
    while True:
        start_afresh(device)
        try:
            return {"grad_accum": number, **measure(number)}
        except Exception as error:
            if not is_out_of_memory(error) or 2 * number > rows:
                raise
        number *= 2  # out here, where the error no longer holds what was allocated
        print(f"out of memory: again, in {number} micro-batches", file=sys.stderr)


def start_afresh(device: torch.device) -> None:
    """Forget what was compiled, free what is left of it, and count the peak of memory from here on."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# ---------------------------------------------------------------- throughput


def throughput(device: torch.device, toy: bool, compiled: bool, nanogpt: Path | None) -> dict[str, Any]:
    """Training steps of 124 M models on random tokens, in bf16."""
    size: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32}
    vocabulary, warm, count = 50_304, 5, 20
    if toy:
        size |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
        vocabulary, warm, count = 256, 1, 2
    T, B = size["block_size"], size["batch_size"]
    rate = matrix_rate(device, 128 if toy else 8192)
    figures: dict[str, Any] = {"bf16_product_flops": rate, "peak_flops": peak(device), "size": size}
    tokens = torch.randint(vocabulary, (B, T + 1))
    batch = {"idx": tokens[:, :-1].contiguous(), "target": tokens[:, 1:].contiguous()}
    sides: dict[str, Callable[..., Any]] = {name: partial(our_step, name) for name in ("gpt2", "qwen3")}
    if nanogpt:
        sides["nanoGPT"] = partial(nanogpt_step, nanogpt)
    for name, make in sides.items():
        positions = 0 if name == "qwen3" else T * size["n_embd"]

        def measure(number: int, make: Callable[..., Any] = make, positions: int = positions) -> dict[str, Any]:
            step, parameters = make(size, vocabulary, batch, device, compiled, number)
            times = timed(step, device, warm, count)
            per_token = 6 * (parameters - positions) + 12 * size["n_layer"] * size["n_embd"] * T
            return {"parameters": parameters, **speed(times, B * T, per_token, rate, device)}

        figures[name] = attempt(name, partial(fitting, measure, B, device))
        print(name, json.dumps(figures[name]))
    return figures


def our_step(name: str, size: dict[str, Any], vocabulary: int, batch: Batch, device: torch.device, compiled: bool,
             number: int) -> tuple[Callable[[], Any], int]:
    """(a training step of bardlet with AdamW, as nanoGPT has it, in so many micro-batches; the model's parameters)."""
    rows = size["batch_size"] // number
    sizes = {**size, "batch_size": rows}
    config = TrainConfig(model=name, optimizer="adamw", lr=6e-4, grad_accum=number, **sizes).resolved()
    torch.manual_seed(0)
    model = models.build(config.model_config(vocabulary)).to(device)
    compiler.compile_blocks(model, on=compiled)
    optimizers, objective, here = optim.build(model, config), next_token_objective(), Dist(0, 1, device)
    return (lambda: train_step(model, optimizers, batch, objective, config, here, "bf16"),
            sum(p.numel() for p in model.parameters()))


def nanogpt_step(path: Path, size: dict[str, Any], vocabulary: int, batch: Batch, device: torch.device, compiled: bool,
                 number: int) -> tuple[Callable[[], Any], int]:
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
    run = torch.compile(model) if compiled else model
    micro = list(zip(*(batch[key].to(device).chunk(number) for key in ("idx", "target")), strict=True))

    def step() -> None:
        for x, y in micro:
            with torch.autocast(device.type, torch.bfloat16):
                _, value = run(x, y)
            (value / number).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- seconds to a loss


def to_loss(device: torch.device, toy: bool, compiled: bool, text: Path) -> dict[str, Any]:
    """Train a qwen3 of 10.7 M parameters on the training part; look at the validation loss on the way.

    Seconds, those to the target, too, are of training: cutting a batch, bringing it to the device, the step. Left out
    are the first two steps, in which the model is compiled (`compiling_seconds`), the evaluations, and what comes
    before the first step. There are 40 evaluations: the target may be seen a fortieth of the steps late.
    """
    whole = text.read_text(encoding="utf-8")
    place = {c: i for i, c in enumerate(sorted(set(whole)))}
    tokens = np.array([place[c] for c in whole], dtype=np.uint16)
    cut = int(0.9 * len(tokens))
    size: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "steps": 800}
    if toy:
        size |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "steps": 40}
    look_at = validation_windows(tokens[cut:] if not toy else tokens[cut : cut + 100], min(256, size["block_size"]))

    def learn(number: int) -> dict[str, Any]:
        config = TrainConfig(dropout=0.2, lr=2e-3, muon_lr=2e-2, weight_decay=0.1, grad_accum=number,
                             **{**size, "batch_size": size["batch_size"] // number}).resolved()
        steps, every = size["steps"], max(1, size["steps"] // 40)
        torch.manual_seed(config.seed)
        model = models.build(config.model_config(len(place))).to(device)
        compiler.compile_blocks(model, on=compiled)
        optimizers, here, objective = optim.build(model, config), Dist(0, 1, device), next_token_objective()
        windows = Windows(tokens[:cut], config.block_size, size["batch_size"], config.seed)
        seconds, compiling, curve, reached = 0.0, 0.0, [], None
        for step in range(steps):
            wait(device)
            begun = time.perf_counter()
            optim.set_learning_rate(optimizers, optim.learning_rate(step, steps, config))
            seed_step(config.seed, step, 0)
            train_step(model, optimizers, windows.batch(step), objective, config, here, "bf16")
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

    return fitting(learn, size["batch_size"], device)


def validation(model: Any, windows: Any, device: torch.device) -> float:
    """Nats per character over every window once, protocol (b), in fp32, uncompiled."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        value = mean_loss(model, windows, device, "fp32")
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
    device, toy = args.device, args.toy
    runtime_device.set_threads_and_determinism(None, False, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else runtime_device.processor()
    missing = compiler.compiler_missing(device)
    if missing and not toy:
        print(f"{missing}: going on without torch.compile, which is slower", file=sys.stderr)
    compiled = not toy and not missing
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__,
                              "toy": toy, "compiled": compiled, "compiler_missing": missing}
    begun = time.perf_counter()
    work = {"throughput": lambda: throughput(device, toy, compiled, args.nanogpt),
            "loss": lambda: to_loss(device, toy, compiled, args.text), "generation": lambda: generation(device, toy)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in args.part:
        found = result[part] = attempt(part, work[part])
        failed += [name for name, one in ((part, found), *found.items()) if isinstance(one, dict) and "error" in one]
        result["seconds"] = time.perf_counter() - begun
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(without_curve(found)), flush=True)
    print(f"written to {args.out} after {result['seconds']:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if not toy:
        record.append("gpu", {key: without_curve(found) for key, found in result.items()})


def without_curve(found: Any) -> Any:
    """What a part has found, on a line."""
    return {key: one for key, one in found.items() if key != "curve"} if isinstance(found, dict) else found


if __name__ == "__main__":
    main()
