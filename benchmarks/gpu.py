"""GPU benchmark: tokens/s and MFU of 124 M models, time to a loss, generation. `bash benchmarks/gpu.sh` runs it.

    bash benchmarks/gpu.sh [--nanogpt PATH] [--text FILE] [--out FILE.json] [--part NAME ...] [--toy]

Parts:

- `throughput` trains gpt2 and qwen3 with 124 M parameters on random tokens at context 1,024, each with AdamW and with
  Muon, and with --nanogpt also nanoGPT's model with its own optimizer (AdamW).
- `loss` trains a 10.7 M qwen3 on Tiny Shakespeare, and reports when its validation loss by protocol (b) first reaches
  1.4697, the final loss of nanoGPT's recipe.
- `generation` completes prompts with the 124 M models in bf16 at batch 1 and 64, beside transformers, if installed.

Each part writes its figures to FILE (default: gpu.json in $OUT or in the current folder) when it ends, so an
interrupted run keeps them. If something fails, its error goes to FILE, the rest continues, and the exit code is not 0.
A run without failures also appends a line to results/gpu.jsonl.

On an NVIDIA H200, all parts took 280 s before Muon and transformers were added; about 7 minutes are expected now.
--toy runs the same code at a size for CPUs, to check that it works: without compilation, and without a line of results.

If a step runs out of GPU memory, it is split into 2, 4, 8 ... micro-batches (`grad_accum`), for nanoGPT, too. If
torch.compile cannot be used, all sides run eagerly; `compiler_missing` has the reason.

MFU counts flops as nanoGPT does: 6 N + 12 L C T per token (PaLM, appendix B; N without position embeddings). It is
given as a share of the GPU's peak, if known, and as a share of the measured rate of a large bf16 product.

Needs torch, numpy, tokenizers and safetensors (imported by bardlet's training step), a C compiler and Python's headers
for torch.compile, and the text for `loss`, which it does not download. Without transformers, the figures say so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
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
from bardlet.inference import decoders, generate
from bardlet.inference.decoders import captured
from bardlet.inference.drawing import Draws, Sampling
from bardlet.run import hf
from bardlet.runtime import compiler
from bardlet.runtime import device as runtime_device
from bardlet.runtime.distributed import Dist
from bardlet.training import losses, optim
from bardlet.training.state import Objective
from bardlet.training.step import seed_step, train_step

PEAKS = {"MIG": None, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
         "A100": 312e12, "L40S": 362e12, "RTX 4090 Laptop": None, "RTX 4090 D": 147e12, "RTX 4090": 165e12}
"""Dense bf16 flops per second from the vendors' data sheets, by a substring of the GPU's name; the first match counts.
None: unknown, for example for a MIG slice."""
TARGET = 1.4697
"""Validation loss of nanoGPT's GPU recipe, from its README."""
PARTS = ("throughput", "loss", "generation")


def arguments() -> argparse.Namespace:
    """Parse the command line, and set `device`. Exit with a message if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; default: all")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT to compare with")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.json")
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare's input.txt; default: in $BARDLET_DATA",
                        default=Path(os.environ.get("BARDLET_DATA", ".")) / "tinyshakespeare" / "input.txt")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args()
    options.part = options.part or PARTS
    options.device = runtime_device.pick_device("auto")
    if options.device.type != "cuda" and not options.toy:
        raise SystemExit("no GPU on this machine; use --toy to check the benchmark on a CPU")
    if options.nanogpt and not (options.nanogpt / "model.py").exists():
        raise SystemExit(f"{options.nanogpt}: not a checkout of nanoGPT; give a folder with its model.py")
    if "loss" in options.part and not options.text.is_file():
        raise SystemExit(f"{options.text}: no such file; give the path of Tiny Shakespeare with --text")
    return options


# ---------------------------------------------------------------- timing


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], device: torch.device, warm: int, count: int) -> list[float]:
    """Return the seconds of each of `count` calls, after `warm` warm-up calls."""
    times = []
    for i in range(warm + count):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        if i >= warm:
            times.append(time.perf_counter() - started)
    return times


def matrix_rate(device: torch.device, n: int) -> float:
    """Return the flops per second of a bf16 product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, device, 3, 10))


def peak(device: torch.device) -> float | None:
    """Return the GPU's peak flops per second according to its vendor; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def speed(times: list[float], tokens: int, flops_per_token: float, rate: float, device: torch.device) -> dict[str, Any]:
    """Return the figures of training steps of `tokens` tokens each."""
    per_second = tokens / statistics.median(times)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    peak_flops = peak(device)
    return {"tokens_per_second": per_second, "mfu": per_second * flops_per_token / peak_flops if peak_flops else None,
            "share_of_measured_rate": per_second * flops_per_token / rate, "step_ms": 1000 * statistics.median(times),
            "steps": len(times), "tokens_per_step": tokens, "memory_gib": memory}


def next_token_objective() -> Objective:
    """Return an objective for `train_step` alone, without batches and evaluation."""
    return Objective(lambda step: {}, losses.next_token_loss, losses.count_targets, lambda model: float("nan"))


# ---------------------------------------------------------------- failures


def attempt(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of `work`; if it fails, its error as one line, so that the other parts can run."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        print(f"{name} failed; continuing", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def fitting(measure: Callable[[int], dict[str, Any]], rows: int, device: torch.device) -> dict[str, Any]:
    """Return the figures of `measure` with the fewest micro-batches of `rows` rows that fit in memory: 1, 2, 4 ..."""
    number = 1
    while True:
        reset(device)
        try:
            return {"grad_accum": number, **measure(number)}
        except Exception as error:
            if not is_out_of_memory(error) or 2 * number > rows:
                raise
        number *= 2  # outside of `except`, where the error no longer keeps tensors alive
        print(f"out of memory; trying again with {number} micro-batches", file=sys.stderr)


def reset(device: torch.device) -> None:
    """Drop compiled code, free its memory, and reset the peak memory counter."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# ---------------------------------------------------------------- throughput


def throughput(device: torch.device, toy: bool, compiled: bool, nanogpt: Path | None) -> dict[str, Any]:
    """Time training steps of 124 M models on random tokens, in bf16."""
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
    sides: dict[str, Callable[..., Any]] = {}
    for name in ("gpt2", "qwen3"):
        sides |= {name: partial(our_step, name), f"{name} muon": partial(our_step, name, optimizer="muon")}
    if nanogpt:
        sides["nanoGPT"] = partial(nanogpt_step, nanogpt)
    for name, make_step in sides.items():
        positions = 0 if name.startswith("qwen3") else T * size["n_embd"]

        def measure(number: int, make_step: Callable[..., Any] = make_step,
                    positions: int = positions) -> dict[str, Any]:
            step, parameters = make_step(size, vocabulary, batch, device, compiled, number)
            times = timed(step, device, warm, count)
            per_token = 6 * (parameters - positions) + 12 * size["n_layer"] * size["n_embd"] * T
            return {"parameters": parameters, **speed(times, B * T, per_token, rate, device)}

        figures[name] = attempt(name, partial(fitting, measure, B, device))
        print(name, json.dumps(figures[name]))
    return figures


def our_step(name: str, size: dict[str, Any], vocabulary: int, batch: Batch, device: torch.device, compiled: bool,
             number: int, optimizer: str = "adamw") -> tuple[Callable[[], Any], int]:
    """Return a bardlet training step in `number` micro-batches, and the number of parameters.

    optimizer: "adamw", with nanoGPT's settings, or "muon", with bardlet's own learning rate for the matrices.
    """
    rows = size["batch_size"] // number
    sizes = {**size, "batch_size": rows}
    config = TrainConfig(model=name, optimizer=optimizer, lr=6e-4, grad_accum=number, **sizes).resolved()
    torch.manual_seed(0)
    model = models.build(config.model_config(vocabulary)).to(device)
    compiler.compile_blocks(model, on=compiled)
    optimizers, objective, dist = optim.build(model, config), next_token_objective(), Dist(0, 1, device)
    return (lambda: train_step(model, optimizers, batch, objective, config, dist, "bf16"),
            sum(p.numel() for p in model.parameters()))


def nanogpt_step(path: Path, size: dict[str, Any], vocabulary: int, batch: Batch, device: torch.device, compiled: bool,
                 number: int) -> tuple[Callable[[], Any], int]:
    """Return nanoGPT's step (as in its train.py: compiled as a whole, clipped at 1), and the number of parameters."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    assert spec and spec.loader, "the file name must end in .py"
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


# ---------------------------------------------------------------- time to a loss


def to_loss(device: torch.device, toy: bool, compiled: bool, text: Path) -> dict[str, Any]:
    """Train a 10.7 M qwen3 on the training split, and evaluate its validation loss 40 times.

    All seconds, including those to the target, are training time: building a batch, copying it to the device, the step.
    They exclude the first two steps, which compile the model (`compiling_seconds`), evaluation, and setup. With 40
    evaluations, the target may be noticed up to 1/40 of the steps late.
    """
    corpus = text.read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(corpus)))}
    tokens = np.array([ids[c] for c in corpus], dtype=np.uint16)
    cut = int(0.9 * len(tokens))
    size: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "steps": 800}
    if toy:
        size |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "steps": 40}
    val_batches = validation_windows(tokens[cut:] if not toy else tokens[cut : cut + 100], min(256, size["block_size"]))

    def train(number: int) -> dict[str, Any]:
        config = TrainConfig(dropout=0.2, lr=2e-3, muon_lr=2e-2, weight_decay=0.1, grad_accum=number,
                             **{**size, "batch_size": size["batch_size"] // number}).resolved()
        steps, every = size["steps"], max(1, size["steps"] // 40)
        torch.manual_seed(config.seed)
        model = models.build(config.model_config(len(ids))).to(device)
        compiler.compile_blocks(model, on=compiled)
        optimizers, dist, objective = optim.build(model, config), Dist(0, 1, device), next_token_objective()
        windows = Windows(tokens[:cut], config.block_size, size["batch_size"], config.seed)
        seconds, compiling, curve, reached = 0.0, 0.0, [], None
        for step in range(steps):
            wait(device)
            started = time.perf_counter()
            optim.set_learning_rate(optimizers, optim.learning_rate(step, steps, config))
            seed_step(config.seed, step, 0)
            train_step(model, optimizers, windows.batch(step), objective, config, dist, "bf16")
            wait(device)
            elapsed = time.perf_counter() - started
            if step < 2:  # the second step may recompile
                compiling += elapsed
            else:
                seconds += elapsed
            if (step + 1) % every == 0:
                value = validation(model, val_batches, device)
                curve.append([step + 1, seconds, value])
                if reached is None and value <= TARGET:
                    reached = seconds
        return {"target": TARGET, "seconds_to_target": reached, "compiling_seconds": compiling, "seconds": seconds,
                "last": curve[-1][2], "steps": steps, "settings": size, "curve": curve}

    return fitting(train, size["batch_size"], device)


def validation(model: Any, windows: Any, device: torch.device) -> float:
    """Return the validation loss in nats per character by protocol (b), in fp32, uncompiled."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        value = mean_loss(model, windows, device, "fp32")
    model.train()
    return value


# ---------------------------------------------------------------- generation


def generation(device: torch.device, toy: bool, compiled: bool) -> dict[str, Any]:
    """Return tokens per second over all rows, of untrained 124 M models in bf16: 512 new tokens after a prompt of 64.

    `bardlet` is a greedy call of `generate`, which packs the weights and captures its graphs. `bardlet sampled` draws
    from the 50 likeliest tokens; `bardlet steps` keeps weights and graphs from its first call. `transformers` has the
    same weights: greedy, with a static cache, and compiled if training was. The first call of each is not timed.
    """
    size, vocabulary, prompt, count = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}, 50_304, 64, 512
    if toy:
        size, vocabulary, prompt, count = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}, 256, 4, 8
    peer = importlib.util.find_spec("transformers") is not None
    figures: dict[str, Any] = {"size": size, "prompt": prompt, "new_tokens": count,
                               "transformers": importlib.metadata.version("transformers") if peer else "not installed"}
    for family in ("gpt2", "qwen3"):
        torch.manual_seed(0)
        config = TrainConfig(model=family, **size).resolved().model_config(vocabulary)
        model = models.build(config).to(device, torch.bfloat16).eval()
        for batch in (1, 64):
            idx_BT = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
            complete = partial(generate.generate, model, idx_BT.tolist(), count)
            sides = {"bardlet": lambda complete=complete: partial(complete, temperature=0.0),
                     "bardlet sampled": lambda complete=complete: partial(complete, top_k=50, seed=0),
                     "bardlet steps": partial(kept_steps, model, idx_BT.tolist(), count)}
            if peer:
                sides["transformers"] = partial(transformers_side, model, idx_BT.to(device), count, compiled)
            for side, make in sides.items():
                name = f"{family} batch {batch} {side}"

                def measure(make: Callable[[], Callable[[], Any]] = make, batch: int = batch) -> dict[str, Any]:
                    times = timed(make(), device, 1, 1 if toy else 3)
                    return {"tokens_per_second": batch * count / statistics.median(times), "seconds": times}

                reset(device)
                figures[name] = attempt(name, measure)
                print(name, json.dumps(figures[name]), flush=True)
    return figures


@torch.inference_mode()
def kept_steps(model: Any, prompts: list[list[int]], count: int) -> Callable[[], Any]:
    """Return a greedy completion of the prompts whose calls share the packed weights and the graphs."""
    sampling = Sampling(temperature=0.0)
    steps = captured.TokenSteps(model, decoders.decoder(model), sampling, len(prompts), len(prompts[0]) + count)

    def run() -> None:
        left = [count] * len(prompts)

        def keep(row: int, token: int) -> bool:
            left[row] -= 1
            return left[row] > 0

        list(captured.complete(steps, [(i, ids, Draws(sampling, i)) for i, ids in enumerate(prompts)], keep))
        if steps.device.type == "cuda" and not steps.capture:
            raise RuntimeError("no CUDA graph was captured; the warning above says why")

    return run


def transformers_side(model: Any, idx_BT: torch.Tensor, count: int, compiled: bool) -> Callable[[], Any]:
    """Return a greedy completion by transformers, from the model's own folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model.to_hf(model.config) | no_ids), encoding="utf-8")
        hf.write_tensors(Path(folder, "model.safetensors"), model.hf_state_dict())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype)
    theirs = theirs.to(idx_BT.device).eval()
    return partial(theirs.generate, idx_BT, attention_mask=torch.ones_like(idx_BT), max_new_tokens=count,
                   min_new_tokens=count, do_sample=False, cache_implementation="static", disable_compile=not compiled)


# ---------------------------------------------------------------- all


def main() -> None:
    """Run the parts, and write the figures of each as soon as it ends."""
    args = arguments()
    device, toy = args.device, args.toy
    runtime_device.set_threads_and_determinism(None, False, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else runtime_device.processor()
    missing = compiler.compiler_missing(device)
    if missing and not toy:
        print(f"{missing}; continuing without torch.compile, which is slower", file=sys.stderr)
    compiled = not toy and not missing
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__,
                              "toy": toy, "compiled": compiled, "compiler_missing": missing}
    started = time.perf_counter()
    work = {"throughput": lambda: throughput(device, toy, compiled, args.nanogpt),
            "loss": lambda: to_loss(device, toy, compiled, args.text),
            "generation": lambda: generation(device, toy, compiled)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in args.part:
        figures = result[part] = attempt(part, work[part])
        failed += [name for name, value in ((part, figures), *figures.items())
                   if isinstance(value, dict) and "error" in value]
        result["seconds"] = time.perf_counter() - started
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(without_curve(figures)), flush=True)
    print(f"wrote {args.out} after {result['seconds']:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if not toy:
        record.append("gpu", {key: without_curve(value) for key, value in result.items()})


def without_curve(figures: Any) -> Any:
    """Return the figures of a part without its loss curve."""
    return {key: value for key, value in figures.items() if key != "curve"} if isinstance(figures, dict) else figures


if __name__ == "__main__":
    main()
