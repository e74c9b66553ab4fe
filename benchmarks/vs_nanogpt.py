"""nanoGPT's recipes trained by nanoGPT and by bardlet, in turn on one machine: tokens/s, wall time, loss, peak memory.

    python benchmarks/vs_nanogpt.py --nanogpt PATH [--recipe cpu] [--repeats 3] [--steps 2000] [--no-save]
    python benchmarks/vs_nanogpt.py --nanogpt PATH --recipe gpu [--repeats 3] [--steps 10]

PATH is a checkout of karpathy/nanoGPT that runs in this Python; it is copied, not changed. Both recipes are from its
README, and run on the CPU with AdamW:

- `cpu`: 4 layers, 4 heads, 128 channels, block 64, batch 12, no dropout, 2,000 steps with an evaluation every 250.
- `gpu`: 6 layers, 6 heads, 384 channels (10.65 M parameters), block 256, batch 64, dropout 0.2; only a few steps, and
  an evaluation after the last one.

The sides train the same model with the same settings, a gpt2 without biases, which is nanoGPT's default:

- `nanoGPT`: as its README says for a CPU, in fp32 and uncompiled; `nanoGPT compiled`: with --compile=True.
- `bardlet fp32` and `bardlet fp32 compiled`: the same two.
- `bardlet`: in the precision that bardlet chooses for this machine, and compiled if it chooses so (`gpu`: compiled).
- `its own`, next to a full `cpu`: another model and optimizer for at least the same loss (configs/seconds.toml).

Each repeat of bardlet has its own seed; nanoGPT always uses its default seed.

- Tokens/s: of the median step of the second half, without evaluation. bardlet logs ten short steps together.
- Wall time: the command from start to exit.
- Training time: all steps at that rate.
- Memory: the peak resident set size of the process.
- Loss: for `cpu`, both checkpoints on the same windows with the same code, by protocol (a) of the design: 200 batches
  of 64 random windows of 64 characters, drawn with a fixed seed.
- `rate`: GFLOP/s of a large product in fp32 and in bf16, before each round.

Evaluations during training read the same number of tokens on both sides, except for bardlet's own recipe (none).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record


@dataclass(frozen=True)
class Recipe:
    """A recipe from nanoGPT's README: sizes, steps and evaluation."""

    n_layer: int
    n_head: int
    n_embd: int
    block: int
    batch: int
    dropout: float
    steps: int
    eval_every: int
    """Steps between evaluations; 0: only after the last step."""
    eval_batches: int
    """Batches per evaluation."""
    log_every: int
    """Steps per line of bardlet's log, whose times are in milliseconds."""

    def nanogpt(self, steps: int, compiled: bool) -> list[str]:
        """Return nanoGPT's command line. It also evaluates before its first step."""
        return ["config/train_shakespeare_char.py", "--device=cpu", f"--compile={compiled}", "--log_interval=1",
                f"--n_layer={self.n_layer}", f"--n_head={self.n_head}", f"--n_embd={self.n_embd}",
                f"--block_size={self.block}", f"--batch_size={self.batch}", f"--dropout={self.dropout}",
                f"--eval_iters={self.eval_batches}", f"--eval_interval={self.eval_every or steps}", "--out_dir=out",
                f"--max_iters={steps}", f"--lr_decay_iters={steps}"]

    def bardlet(self, steps: int) -> list[str]:
        """Return the same settings for bardlet."""
        return ["tinyshakespeare", "--tokenizer", "char", "--model", "gpt2", "--no-bias",
                "--n-layer", str(self.n_layer), "--n-head", str(self.n_head), "--n-embd", str(self.n_embd),
                "--activation", "gelu",  # as in nanoGPT, not GPT-2's tanh approximation
                "--block-size", str(self.block), "--batch-size", str(self.batch), "--dropout", str(self.dropout),
                "--optimizer", "adamw", "--lr", "1e-3", "--min-lr-ratio", "0.1", "--schedule", "cosine",
                "--warmup-steps", "100", "--beta1", "0.9", "--beta2", "0.99", "--weight-decay", "0.1",
                "--grad-clip", "1", "--eval-every", str(self.eval_every), "--save-every", str(self.eval_every),
                "--log-every", str(self.log_every), "--keep", "best" if self.eval_every else "last",
                # nanoGPT evaluates on eval_batches of the training split and as many of the validation split
                "--eval-tokens", str(2 * self.eval_batches * self.batch * self.block), "--steps", str(steps)]


SECONDS = record.HERE.parent / "configs" / "seconds.toml"

RECIPES = {"cpu": Recipe(4, 4, 128, 64, 12, 0.0, 2000, 250, 20, 10),
           "gpu": Recipe(6, 6, 384, 256, 64, 0.2, 10, 0, 1, 1)}
BLOCK = 64
COMPILED = "nanoGPT compiled"

# runs in the copy of nanoGPT, with its model and checkpoint, on our windows
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
    """Run both sides in turn, print the table, and append a line of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    steps = args.steps or recipe.steps
    with tempfile.TemporaryDirectory() as scratch:
        theirs = prepare_nanogpt(args.nanogpt, Path(scratch))
        windows = validation_windows(Path(scratch) / "windows.npy") if args.recipe == "cpu" else None
        same = recipe.bardlet(steps)
        ours = {"bardlet fp32": [*same, "--dtype", "fp32", "--compile", "off"],
                "bardlet fp32 compiled": [*same, "--dtype", "fp32", "--compile", "on"],
                "bardlet": [*same, "--compile", "auto" if args.recipe == "cpu" else "on"]}
        if args.recipe == "cpu" and steps == recipe.steps:
            ours["its own"] = ["--config", str(SECONDS), "--log-every", str(recipe.log_every)]
        sides: dict[str, list[dict[str, Any]]] = {name: [] for name in ("nanoGPT", COMPILED, *ours)}
        rates = []
        for repeat in range(args.repeats):
            rates.append({dtype: round(record.product_rate(dtype), 1) for dtype in ("fp32", "bf16")})
            for name in ("nanoGPT", COMPILED):
                sides[name].append(run_nanogpt(theirs, recipe, steps, windows, name == COMPILED))
            for name, arguments in ours.items():
                sides[name].append(run_bardlet(Path(scratch), [*arguments, "--seed", str(1337 + repeat)], windows))
            print(json.dumps({"rate": rates[-1], **{name: runs[-1] for name, runs in sides.items()}}), flush=True)
    report(sides, rates, args, steps)


def prepare_nanogpt(source: Path, scratch: Path) -> Path:
    """Return a copy of nanoGPT with its data prepared by its own script."""
    from bardlet.data import named

    copy = scratch / "nanoGPT"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(named.get("tinyshakespeare") / "input.txt", data / "input.txt")
    # the script imports requests for a download that is not needed: an empty module is enough
    (data / "requests.py").write_text("")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    return copy


def validation_windows(path: Path) -> Path:
    """Save the windows of protocol (a), (200, 64, 65) token ids; both vocabularies are the sorted characters."""
    import numpy as np

    from bardlet.data import corpus, shards
    from bardlet.data import windows as data_windows

    dataset = shards.tokenize_corpus(corpus.find(["tinyshakespeare"]), "char")
    batches = data_windows.random_windows(dataset.val, BLOCK, n_batches=200, batch_size=64, seed=0)
    rows = [np.concatenate([batch["idx"].numpy(), batch["target"].numpy()[:, -1:]], axis=1) for batch in batches]
    np.save(path, np.stack(rows))
    return path


def timed(command: list[str], cwd: Path) -> tuple[str, float, float]:
    """Run a command; return its output, wall seconds and peak MiB. Exit with its output if it fails."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, text=True,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-4000:]}")
    return text, seconds, usage.ru_maxrss / 1024


def figures(seconds: float, mib: float, times: list[float], steps: int, tokens: int,
            loss: float | None) -> dict[str, Any]:
    """Return the figures of a run of `steps` steps of `tokens` tokens.

    times: seconds of each step, in order; the second half counts.
    """
    step = statistics.median(times[len(times) // 2 :])
    return {"seconds": seconds, "training_seconds": step * steps, "tokens_per_second": tokens / step, "peak_mib": mib,
            "loss": loss}


def run_nanogpt(copy: Path, recipe: Recipe, steps: int, windows: Path | None, compiled: bool) -> dict[str, Any]:
    """Train and evaluate nanoGPT."""
    shutil.rmtree(copy / "out", ignore_errors=True)
    output, seconds, mib = timed([sys.executable, "train.py", *recipe.nanogpt(steps, compiled)], copy)
    times = nanogpt_times(output, recipe.eval_every or steps)
    loss = None
    if windows:
        loss = float(timed([sys.executable, "-c", EVALUATE, str(windows)], copy)[0].split()[-1])
    return figures(seconds, mib, times, steps, recipe.batch * recipe.block, loss)


def nanogpt_times(output: str, every: int) -> list[float]:
    """Return the seconds of nanoGPT's iterations in its log, without those that include an evaluation (`every`).

    If no iteration is left, return all.
    """
    iterations = re.findall(r"^iter (\d+): .* time ([\d.]+)ms", output, re.MULTILINE)
    return [float(ms) / 1000 for i, ms in iterations if int(i) % every] or [float(ms) / 1000 for _, ms in iterations]


def run_bardlet(scratch: Path, arguments: list[str], windows: Path | None) -> dict[str, Any]:
    """Train and evaluate bardlet on the same windows."""
    import numpy as np
    import torch

    from bardlet.evaluation import metrics
    from bardlet.run import folder, hf
    from bardlet.run import metrics as run_metrics

    out = scratch / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "bardlet", "train", *arguments, "--device", "cpu", "--out", str(out), "--json"]
    _, seconds, mib = timed(command, scratch)
    lines = [(line["step"], line["seconds"]) for line in run_metrics.read_metrics(out) if "seconds" in line]
    times = [(now - then) / (step - before) for (before, then), (step, now) in itertools.pairwise([(0, 0.0), *lines])]
    loss = None
    if windows:
        model, _ = hf.read_folder(out)
        batches = [{"idx": w[:, :-1], "target": w[:, 1:]} for w in torch.from_numpy(np.load(windows))]
        loss = metrics.mean_loss(model, batches, torch.device("cpu"))
    config, run_record = folder.read_run(out)
    chosen = {"dtype": config.dtype, "compiled": run_record["machine"]["compiled"]}
    return {**figures(seconds, mib, times, run_record["steps"], config.tokens_per_step, loss), **chosen}


def report(sides: dict[str, list[dict[str, Any]]], rates: list[dict[str, float]], args: argparse.Namespace,
           steps: int) -> None:
    """Print medians and ratios, and append them to the results."""
    figures = ("seconds", "training_seconds", "tokens_per_second", "peak_mib", "loss")
    medians: dict[str, Any] = {name: {key: statistics.median(run[key] for run in runs) for key in figures
                                      if runs[0][key] is not None} for name, runs in sides.items()}
    plain, compiled = medians["nanoGPT"], medians[COMPILED]
    print(f"\n{'':22} {'wall s':>8} {'training s':>10} {'tokens/s':>10} {'MiB':>6} {'loss (a)':>9} "
          f"{'of nanoGPT: speed':>18} {'memory':>7} {'of compiled: speed':>19} {'memory':>7}")
    for name, side in medians.items():
        speeds = [side["tokens_per_second"] / each["tokens_per_second"] for each in (plain, compiled)]
        memory = [side["peak_mib"] / each["peak_mib"] for each in (plain, compiled)]
        loss = f"{side['loss']:.4f}" if "loss" in side else "-"
        print(f"{name:22} {side['seconds']:8.1f} {side['training_seconds']:10.1f} {side['tokens_per_second']:10,.0f} "
              f"{side['peak_mib']:6.0f} {loss:>9} "
              f"{speeds[0]:18.2f} {memory[0]:7.2f} {speeds[1]:19.2f} {memory[1]:7.2f}")
    if not args.no_save:
        record.append("vs_nanogpt", {"recipe": args.recipe, "steps": steps, "repeats": args.repeats, "rate": rates,
                                     "medians": medians, "runs": sides})


if __name__ == "__main__":
    main()
