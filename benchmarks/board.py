"""The record board: runs of one command over several seeds, and the table of all of them.

    python benchmarks/board.py run CLASS --seeds 5 -- tinyshakespeare --steps 900 --keep average [...]
    python benchmarks/board.py build

`run` trains once for each seed, each in a process of its own (`bardlet train ARGUMENTS --seed N`), measures the result
by protocol (b) of the design (every validation token but the first once, windows of min(256, context), fp32) and
appends a line to results/board.jsonl. `build` makes README.md of this folder from all lines: a row for each class and
command, and under it the runs of the dial and its contests (dial.py).

CLASS is the machine and the time, as in "2-core CPU, 3 minutes". Seconds are those of training steps; `whole` is the
wall time of the command, with start, tokens, compilation, evaluations and saving. Weights are those of the last step or
the fixed average of the last fifth (`--keep last` or `average`): weights picked by validation have no row.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

RESULTS = record.HERE / "results" / "board.jsonl"
FIRST_SEED = 1337


def main() -> None:
    """Run or build; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure some seeds")
    run.add_argument("name", metavar="CLASS")
    run.add_argument("--seeds", type=int, default=5)
    run.add_argument("--first-seed", type=int, default=FIRST_SEED)
    run.add_argument("--no-save", action="store_true", help="print only")
    commands.add_parser("build", help="make README.md from the results")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if args.command == "build":
        import dial

        pages = "\n".join((page(read()), DIAL, dial.table(dial.read("dial")) + "\n", CONTEST,
                           dial.contest(dial.read("sweep")) + "\n"))
        (record.HERE / "README.md").write_text(pages, encoding="utf-8")
        print("made benchmarks/README.md")
        return
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        figures = one_run(words, seed)
        print(json.dumps(figures), flush=True)
        if not args.no_save:
            record.append("board", {"class": args.name, "arguments": words, **figures})


def one_run(words: list[str], seed: int) -> dict[str, Any]:
    """Train by the command line, and measure what it left."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "bardlet", "train", *words, "--seed", str(seed), "--out", str(out), "--json"]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        whole = time.monotonic() - begun
        if done.returncode:
            sys.exit(f"bardlet train {' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        if said["selected_by"] == "best":
            sys.exit("the weights were picked by validation, which is no record: give --keep last or --keep average")
        return {"seed": seed, "loss": protocol_b(out), "seconds": said["seconds"], "whole": round(whole, 1),
                "steps": said["steps"], "parameters": said["parameters"], "selected_by": said["selected_by"],
                "tokens_per_second": said["tokens_per_second"], **facts(out)}


def facts(out: Path) -> dict[str, Any]:
    """What run.toml knows of the run: model, context, precision, compiled or not, and what it computed on."""
    from bardlet.run import folder

    config, made = folder.read_run(out)
    on = {key: made["machine"][key] for key in ("device", "processor", "compiled", "threads")}
    return {"model": config.model, "block_size": config.block_size, "text": made["text"], "dtype": config.dtype, **on}


def protocol_b(out: Path) -> float:
    """Nats per token over every validation token but the first, no context carried over from window to window."""
    import torch

    from bardlet.data import corpus, shards
    from bardlet.data import windows as data_windows
    from bardlet.evaluation import metrics
    from bardlet.run import folder, hf

    config, _ = folder.read_run(out)
    model, tokenizer = hf.read_folder(out)
    ready = shards.tokenize_corpus(corpus.find(config.text, config.field), tokenizer)
    windows = data_windows.validation_windows(ready.val, min(256, config.block_size))
    return metrics.mean_loss(model, windows, torch.device("cpu"), "fp32")


# ---------------------------------------------------------------- the table


def read() -> list[dict[str, Any]]:
    """All lines, oldest first."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def page(lines: list[dict[str, Any]]) -> str:
    """README.md: a table for each text and class, the lowest loss first; a row for each command and machine."""
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[int, dict[str, Any]]]] = {}
    for line in lines:
        rows = groups.setdefault((line["text"], line["class"]), {})
        rows.setdefault((" ".join(line["arguments"]), machine(line)), {})[line["seed"]] = line  # the newest of a seed
    parts = [HEAD]
    for (text, name), rows in sorted(groups.items(), key=lambda group: (numbers(group[0][1]), group[0][0])):
        table = "\n".join(row(list(runs.values())) for runs in sorted(rows.values(), key=mean_loss))
        parts.append(f"## {name}: {text}\n\n{COLUMNS}\n{table}\n")
    return "\n".join(parts)


HEAD = """# The record board

Built by `python benchmarks/board.py build` from `results/board.jsonl`, a line for each finished run.

Loss: nats per token by protocol (b): every validation token but the first once, windows of min(256, context), fp32;
mean and deviation over the seeds, of each the newest run on that machine. A row with fewer than five seeds is no record
yet. Seconds: of training steps, mean; whole: the command from start to exit, with what the compiler kept of earlier
runs (the first takes some 30 s more, so that a minute from an empty cache is for uncompiled steps: the dial's).
Weights: of the last step, or the fixed average over the last fifth of the steps; never picked by validation.
"""
DIAL = """## The dial

`bardlet train TEXT --minutes M` on the same machine, nothing else said: the newest run of each text, minutes and seed
in `results/dial.jsonl` (`python benchmarks/dial.py run TEXT --minutes M`). Wall: the command from start to exit. Losses
in nats per character of the validation part; the weights are the best by validation, as `train` keeps them by default.
Expected: what the run said before its first step, by the law of its commit, which is fitted to other runs on the
development splits of most of these texts (`dial.py law`), and counts n-grams of the part that is validated on; how much
repetition is worth, one of its constants, was chosen with runs of this table in sight. Off now: by the law that builds
this page, which is told how much was read.
"""
CONTEST = """## Contests

Runs on development splits of about three minutes each (`python benchmarks/dial.py contest`; lines of
`results/sweep.jsonl`), one seed; qwen3 keeps the average of the last fifth, gpt2 with nanoGPT's settings its last step.
The dial's, and those by the clock, were trained by `--minutes 3`, in one sitting, with what the calibration and the
compiler had kept; the others have as many steps as three minutes have at their speed, which was timed apart when the
machine was fast, and were then computed by one thread. How many tokens a weight wants and what a head may cost
(`planning/plan.py`) was found with earlier runs of these contests, so they are no blind test of the dial.
"""
COLUMNS = """| loss | seeds | seconds | whole | parameters | context | weights | machine | commit | command |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def numbers(name: str) -> tuple[str | int, ...]:
    """A class as it is sorted: "2-core CPU, 10 minutes" after "2-core CPU, 3 minutes"."""
    return tuple(int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name))


def mean_loss(runs: dict[int, dict[str, Any]]) -> float:
    """Over the seeds of a row."""
    return statistics.mean(line["loss"] for line in runs.values())


def machine(line: dict[str, Any]) -> str:
    """What a run computed on and how, in words: a GPU by its name, a CPU with its threads."""
    where = line.get("processor") or line["machine"]["processor"]  # older lines: they all ran on the machine's CPU
    threads = f", {line['threads']} threads" if line.get("device", "cpu") == "cpu" else ""
    return f"{where}{threads}, {line['dtype']}" + (", compiled" if line["compiled"] else "")


def row(runs: list[dict[str, Any]]) -> str:
    """One command on one machine, a run of each seed."""
    losses = [line["loss"] for line in runs]
    loss = f"{statistics.mean(losses):.4f}" + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else "")
    last = runs[-1]
    commits = ", ".join(dict.fromkeys(str(line["commit"]) for line in runs))
    return (f"| {loss} | {len(runs)} | {statistics.mean(line['seconds'] for line in runs):.0f} "
            f"| {statistics.mean(line['whole'] for line in runs):.0f} | {last['parameters'] / 1e6:.2f} M "
            f"| {last['block_size']} | {last['selected_by']} | {machine(last)} | {commits} "
            f"| `bardlet train {' '.join(last['arguments'])}` |")


if __name__ == "__main__":
    main()
