"""Compare two commits of bardlet on one machine: training steps, generation, start-up.

    python benchmarks/before_after.py OLD NEW [--rounds 5] [--no-save]

OLD and NEW are commits of this checkout, or `.` for the working tree. Each round runs every task with one commit and
then with the other, in alternating order. The figures are medians over the rounds, and the ratio of NEW to OLD. Needs
Tiny Shakespeare ($BARDLET_DATA or the cache), and an otherwise idle machine. Timing starts at the second line of
metrics.jsonl, so that compilation and the first steps do not count.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"0.8 M": ("4", "4", "128", "128", "32", "120"), "1.8 M": ("4", "4", "192", "128", "32", "100"),
         "10.65 M": ("6", "6", "384", "256", "64", "5")}
"""Layers, heads, channels, context, windows per batch, steps."""


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit, or . for the working tree")
    parser.add_argument("new", help="the same")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", nargs="+", choices=("on", "off"), default=("on", "off"), help="default: both")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = {name: source(name, Path(scratch) / side) for side, name in (("old", args.old), ("new", args.new))}
        for number in range(args.rounds):
            for name in (args.old, args.new) if number % 2 == 0 else (args.new, args.old):
                for task, value in measure(sources[name], Path(scratch) / "run", args.compile).items():
                    figures.setdefault(task, {}).setdefault(name, []).append(value)
                    print(f"round {number + 1}, {name}: {task} {value:,.3f}", file=sys.stderr, flush=True)
    for task, values in figures.items():
        old, new = (statistics.median(values[name]) for name in (args.old, args.new))
        print(f"{task:34} {old:10,.3f} {new:10,.3f}  {new / old:.3f}", flush=True)
        if not args.no_save:
            record.append("before_after", {"task": task, "old_commit": args.old, "new_commit": args.new, "old": old,
                                           "new": new, "rounds": args.rounds})


def source(name: str, folder: Path) -> Path:
    """Return the src folder at a commit, unpacked into `folder`; for `.`, that of this checkout."""
    if name == ".":
        return ROOT / "src"
    done = subprocess.run(["git", "archive", name, "src"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def measure(package: Path, run: Path, compiled: Sequence[str]) -> dict[str, float]:
    """Return all figures of one commit: tokens per second of training and generation, seconds of start-up."""
    figures = {}
    for size, (layers, heads, channels, context, rows, steps) in SIZES.items():
        for compile in compiled:
            subprocess.run(["rm", "-rf", str(run)], check=True)
            call(package, "train", "tinyshakespeare", "--tokenizer", "char", "--n-layer", layers, "--n-head", heads,
                 "--n-embd", channels, "--block-size", context, "--batch-size", rows, "--steps", steps, "--compile",
                 compile, "--eval-every", "0", "--eval-tokens", "1000", "--save-every", "0", "--log-every",
                 str(max(1, int(steps) // 6)), "--keep", "last", "--out", str(run))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            lines = [line for line in lines if "tokens" in line]
            figures[f"train {size}, compile {compile}, tokens/s"] = (
                (lines[-1]["tokens"] - lines[1]["tokens"]) / (lines[-1]["seconds"] - lines[1]["seconds"]))
    for dtype in ("fp32", "int8"):
        done = call(package, "sample", str(run), "--tokens", "800", "--seed", "1", "--dtype", dtype, "--json")
        figures[f"sample 10.65 M, {dtype}, tokens/s"] = json.loads(done.splitlines()[-1])["tokens_per_second"]
    for command in (("--help",), ("train", "--help"), ("sample", str(run), "--tokens", "1", "--seed", "1")):
        started = time.perf_counter()
        call(package, *command)
        figures[f"start {' '.join(command[:2]).replace(str(run), 'RUN')}, s"] = time.perf_counter() - started
    return figures


def call(package: Path, *arguments: str) -> str:
    """Run a bardlet command, and return its standard output."""
    env = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, "-m", "bardlet", *arguments], env=env, capture_output=True, text=True,
                          check=True).stdout


if __name__ == "__main__":
    main()
