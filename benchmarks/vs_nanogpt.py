"""nanoGPT's CPU recipe by nanoGPT and by bardlet, in turn on one machine: wall time, tokens/s, loss.

    python benchmarks/vs_nanogpt.py --nanogpt PATH [--repeats 3] [--steps 2000] [--no-save]

PATH is a checkout of karpathy/nanoGPT; it is copied, not changed, and must run in this Python. The recipe is the one of
its README: 4 layers, 4 heads, 128 channels, block 64, batch 12, 2,000 steps, AdamW, fp32, no dropout, an evaluation
every 250 steps. bardlet trains the `gpt2` layout (which has biases where nanoGPT's default has none) with the same
settings, once as nanoGPT does (fp32, eager) and once as bardlet would (bf16, compiled).

Wall time is that of the whole command, from start to exit. Both checkpoints are then evaluated by the same code
(protocol (a) of the design: 200 batches of 64 windows of 64 characters from a generator of their own) on the same
windows. The evaluations on the way read as many tokens on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

BLOCK, BATCH = 64, 12
NANOGPT = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
           f"--block_size={BLOCK}", f"--batch_size={BATCH}", "--n_layer=4", "--n_head=4", "--n_embd=128",
           "--dropout=0.0"]
BARDLET = ["tinyshakespeare", "--tokenizer", "char", "--model", "gpt2", "--n-layer", "4", "--n-head", "4",
           "--n-embd", "128", "--activation", "gelu",  # nanoGPT's, not GPT-2's approximation of it
           "--block-size", str(BLOCK), "--batch-size", str(BATCH), "--dropout", "0",
           "--optimizer", "adamw", "--lr", "1e-3", "--min-lr-ratio", "0.1", "--schedule", "cosine",
           "--warmup-steps", "100", "--beta1", "0.9", "--beta2", "0.99", "--weight-decay", "0.1", "--grad-clip", "1",
           "--eval-every", "250", "--save-every", "250", "--keep", "best",
           # nanoGPT's evaluation: 20 batches of training and 20 of validation text
           "--eval-tokens", str(2 * 20 * BATCH * BLOCK)]

# runs inside the copy of nanoGPT: its model, its checkpoint, our windows
EVALUATE = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])); model.load_state_dict(saved["model"]); model.eval()
windows = torch.from_numpy(np.load(sys.argv[1], allow_pickle=False))
with torch.no_grad():
    print(sum(model(w[:, :-1].contiguous(), w[:, 1:].contiguous())[1].item() for w in windows) / len(windows))
"""


def main() -> None:
    """Run both sides in turn, print the table, append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        theirs = prepare_nanogpt(args.nanogpt, Path(scratch))
        windows = validation_windows(Path(scratch) / "windows.npy")
        sides: dict[str, list[dict[str, float]]] = {"nanoGPT": [], "bardlet": [], "bardlet bf16": []}
        for repeat in range(args.repeats):
            sides["nanoGPT"].append(run_nanogpt(theirs, args.steps, windows))
            plain = ["--dtype", "fp32", "--compile", "off", "--seed", str(1337 + repeat)]
            sides["bardlet"].append(run_bardlet(Path(scratch), args.steps, plain, windows))
            fast = ["--dtype", "bf16", "--compile", "on", "--seed", str(1337 + repeat)]
            sides["bardlet bf16"].append(run_bardlet(Path(scratch), args.steps, fast, windows))
            print(json.dumps({name: runs[-1] for name, runs in sides.items()}), flush=True)
    report(sides, args)


def prepare_nanogpt(source: Path, scratch: Path) -> Path:
    """A copy of nanoGPT with its data prepared by its own script."""
    from bardlet import corpus

    copy = scratch / "nanoGPT"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(corpus.get("tinyshakespeare") / "input.txt", data / "input.txt")
    # its script imports requests to download what lies there already: an empty module is enough
    (data / "requests.py").write_text("")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    return copy


def validation_windows(path: Path) -> Path:
    """The windows of protocol (a) as an array (200, 64, 65) of ids; both vocabularies are the sorted characters."""
    import numpy as np

    from bardlet import corpus, data

    ready = data.prepare(corpus.find(["tinyshakespeare"]), "char")
    batches = data.random_windows(ready.val, BLOCK, n_batches=200, batch_size=64, seed=0)
    np.save(path, np.stack([np.concatenate([i.numpy(), t.numpy()[:, -1:]], axis=1) for i, t in batches]))
    return path


def timed(command: list[str], cwd: Path) -> tuple[str, float]:
    """(output, wall seconds) of a command; one that fails ends the benchmark with what it said."""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout, seconds


def run_nanogpt(copy: Path, steps: int, windows: Path) -> dict[str, float]:
    """Train and evaluate the peer."""
    shutil.rmtree(copy / "out", ignore_errors=True)
    command = [sys.executable, "train.py", *NANOGPT, "--out_dir=out", f"--max_iters={steps}",
               f"--lr_decay_iters={steps}"]
    output, seconds = timed(command, copy)
    step_ms = [float(ms) for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", output, re.MULTILINE)]
    loss = float(timed([sys.executable, "-c", EVALUATE, str(windows)], copy)[0].split()[-1])
    return {"seconds": seconds, "tokens_per_second": 1000 * BATCH * BLOCK / statistics.median(step_ms), "loss": loss}


def run_bardlet(scratch: Path, steps: int, extra: list[str], windows: Path) -> dict[str, float]:
    """Train and evaluate bardlet, on the same windows."""
    import numpy as np
    import torch

    from bardlet import evaluate, hf

    out = scratch / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "bardlet", "train", *BARDLET, *extra, "--steps", str(steps), "--out", str(out),
               "--json"]
    output, seconds = timed(command, scratch)
    summary = json.loads(output.splitlines()[-1])
    model, _ = hf.read_folder(out)
    batches = [{"idx": w[:, :-1], "target": w[:, 1:]} for w in torch.from_numpy(np.load(windows))]
    loss = evaluate.mean_loss(model, batches, torch.device("cpu"))
    return {"seconds": seconds, "tokens_per_second": summary["tokens_per_second"], "loss": loss}


def report(sides: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """Medians and ratios, printed and appended to the results."""
    medians: dict[str, Any] = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                               for name, runs in sides.items()}
    peer = medians["nanoGPT"]
    print(f"\n{'':14} {'wall s':>8} {'tokens/s':>10} {'loss (a)':>9} {'wall ratio':>11} {'speed ratio':>12}")
    for name, median in medians.items():
        wall, speed = (median[key] / peer[key] for key in ("seconds", "tokens_per_second"))
        print(f"{name:14} {median['seconds']:8.1f} {median['tokens_per_second']:10,.0f} {median['loss']:9.4f} "
              f"{wall:11.3f} {speed:12.2f}")
    if not args.no_save:
        record.append("vs_nanogpt", {"steps": args.steps, "repeats": args.repeats, "medians": medians, "runs": sides})


if __name__ == "__main__":
    main()
