"""Two commits of bardlet in turn on one machine: a training step, generation, start-up.

    python benchmarks/before_after.py OLD NEW [--rounds 5] [--no-save]

Each is a commit of this checkout, or `.` for the tree as it is. A round has every task by one commit and then by the
other, in alternating order; a figure is the median over the rounds, beside it NEW by OLD. Needs Tiny Shakespeare
($BARDLET_DATA or the cache). Nothing else may run. Steps are timed from the second line of metrics.jsonl on, so that
compilation and the first steps do not count.
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
"""Layers, heads, channels, context, windows of a batch, steps."""


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", nargs="+", choices=("on", "off"), default=("on", "off"))
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = {name: source(name, Path(scratch) / side) for side, name in (("old", args.old), ("new", args.new))}
        for number in range(args.rounds):
            for name in (args.old, args.new) if number % 2 == 0 else (args.new, args.old):
                for task, value in measure(sources[name], Path(scratch) / "run", args.compile).items():
                    found.setdefault(task, {}).setdefault(name, []).append(value)
                    print(f"round {number + 1}, {name}: {task} {value:,.3f}", file=sys.stderr, flush=True)
    for task, values in found.items():
        old, new = (statistics.median(values[name]) for name in (args.old, args.new))
        print(f"{task:34} {old:10,.3f} {new:10,.3f}  {new / old:.3f}", flush=True)
        if not args.no_save:
            record.append("before_after", {"task": task, "old_commit": args.old, "new_commit": args.new, "old": old,
                                           "new": new, "rounds": args.rounds})


def source(name: str, folder: Path) -> Path:
    """The package's folder at a commit, put below `folder`; or that of this checkout."""
    if name == ".":
        return ROOT / "src"
    done = subprocess.run(["git", "archive", name, "src"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def measure(package: Path, run: Path, compiled: Sequence[str]) -> dict[str, float]:
    """Every figure of one commit: tokens per second of steps and generation, seconds of starts."""
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
    for words in (("--help",), ("train", "--help"), ("sample", str(run), "--tokens", "1", "--seed", "1")):
        begun = time.perf_counter()
        call(package, *words)
        figures[f"start {' '.join(words[:2]).replace(str(run), 'RUN')}, s"] = time.perf_counter() - begun
    return figures


def call(package: Path, *words: str) -> str:
    """Standard output of a command of bardlet's."""
    env = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, "-m", "bardlet", *words], env=env, capture_output=True, text=True,
                          check=True).stdout


if __name__ == "__main__":
    main()
