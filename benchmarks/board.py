"""The record board: train one command with several seeds, and build a table of all such runs.

    python benchmarks/board.py run CLASS --seeds 5 -- tinyshakespeare --steps 900 --keep average [...]
    python benchmarks/board.py build

`run` trains once per seed, each in its own process (`bardlet train ARGUMENTS --seed N`). It measures the result by
protocol (b) of the design (every validation token but the first once, windows of min(256, context), fp32) and appends a
line to results/board.jsonl. `build` writes README.md of this folder from all lines: a row per class and command, then
the runs of the dial and its contests (dial.py).

CLASS is machine and time, such as "2-core CPU, 3 minutes". `seconds` counts training steps; `whole` is the wall time of
the command, with start-up, tokenization, compilation, evaluations and saving. The weights are those of the last step or
the average of the last fifth (`--keep last` or `average`): weights selected by validation get no row.
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

FIRST_SEED = 1337


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure several seeds")
    run.add_argument("name", metavar="CLASS")
    run.add_argument("--seeds", type=int, default=5)
    run.add_argument("--first-seed", type=int, default=FIRST_SEED)
    run.add_argument("--no-save", action="store_true", help="print only")
    commands.add_parser("build", help="write README.md from the results")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, train_args = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if args.command == "build":
        import dial

        from bardlet.errors import BardletError

        try:
            pages = "\n".join((page(record.read("board")), DIAL, dial.table(record.read("dial")) + "\n", CONTEST,
                               dial.contest(record.read("sweep")) + "\n"))
        except BardletError as error:
            sys.exit(f"{error}\nthe table of the dial needs every text that it lists; README.md is unchanged")
        (record.HERE / "README.md").write_text(pages, encoding="utf-8")
        print("wrote benchmarks/README.md")
        return
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        figures = one_run(train_args, seed)
        print(json.dumps(figures), flush=True)
        if not args.no_save:
            record.append("board", {"class": args.name, "arguments": train_args, **figures})


def one_run(arguments: list[str], seed: int) -> dict[str, Any]:
    """Train with `bardlet train ARGUMENTS`, and measure the final weights."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "bardlet", "train", *arguments, "--seed", str(seed), "--out", str(out),
                   "--json"]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        whole = time.monotonic() - started
        if done.returncode:
            sys.exit(f"bardlet train {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        if result["selected_by"] == "best":
            sys.exit("the weights were selected by validation, which does not count; use --keep last or --keep average")
        return {"seed": seed, "loss": protocol_b(out), "seconds": result["seconds"], "whole": round(whole, 1),
                "steps": result["steps"], "parameters": result["parameters"], "selected_by": result["selected_by"],
                "tokens_per_second": result["tokens_per_second"], **run_metadata(out)}


def run_metadata(out: Path) -> dict[str, Any]:
    """Return model, context, corpus, precision and machine of a run, from its run.toml."""
    from bardlet.run import folder

    config, run_record = folder.read_run(out)
    machine = {key: run_record["machine"][key] for key in ("device", "processor", "compiled", "threads")}
    return {"model": config.model, "block_size": config.block_size, "text": run_record["text"], "dtype": config.dtype,
            **machine}


def protocol_b(out: Path) -> float:
    """Return nats per token over all validation tokens but the first, without context across windows."""
    import torch

    from bardlet.data import corpus, shards
    from bardlet.data import windows as data_windows
    from bardlet.evaluation import metrics
    from bardlet.run import folder, hf

    config, _ = folder.read_run(out)
    model, tokenizer = hf.read_folder(out)
    dataset = shards.tokenize_corpus(corpus.find(config.text, config.field), tokenizer)
    windows = data_windows.validation_windows(dataset.val, min(256, config.block_size))
    return metrics.mean_loss(model, windows, torch.device("cpu"), "fp32")


# ---------------------------------------------------------------- the table


def page(lines: list[dict[str, Any]]) -> str:
    """Return README.md: a table per class and text, with a row per command and machine, lowest loss first."""
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[int, dict[str, Any]]]] = {}
    for line in lines:
        rows = groups.setdefault((line["text"], line["class"]), {})
        rows.setdefault((" ".join(line["arguments"]), machine(line)), {})[line["seed"]] = line  # a seed's newest line
    parts = [HEAD]
    for (text, name), rows in sorted(groups.items(), key=lambda group: (numbers(group[0][1]), group[0][0])):
        table = "\n".join(row(list(runs.values())) for runs in sorted(rows.values(), key=mean_loss))
        parts.append(f"## {name}: {text}\n\n{COLUMNS}\n{table}\n")
    return "\n".join(parts)


HEAD = """# The record board

`python benchmarks/board.py build` writes this page. The board comes from `results/board.jsonl`, which has a line per
finished run.

- Loss: nats per token by protocol (b), in fp32. Every validation token but the first counts once; windows have min(256,
  context) tokens. The table has the mean and standard deviation over the seeds, with the newest run of each on that
  machine. A row with fewer than five seeds is not a record yet.
- Training: mean seconds of the training steps.
- Total: mean seconds of the command from start to exit, with a warm compiler cache. (A cold one adds about 30 s. With
  `--minutes 1`, bardlet then does not compile.)
- Weights: those of the last step, or the average over the last fifth of the steps. They are never selected by
  validation loss.
"""
DIAL = """## The dial

*The dial* is `bardlet train TEXT --minutes M` without further options. The table has the newest run on the same machine
per text, minutes and seed, from `results/dial.jsonl` (`python benchmarks/dial.py run TEXT --minutes M`).

- Wall: time of the command from start to exit.
- Predicted and actual: losses in nats per character of the validation split, with the best weights by validation, which
  `train` keeps by default.
- Predicted: before the first step, by the formula of the run's commit. The formula is fitted to other runs, on the
  development splits of most of these texts (`dial.py law`). It uses n-gram losses of the validation split. We chose one
  of its constants, the effect of repetition, with runs of this table in sight.
- Error now: the error of the current formula, given the actual number of epochs.
"""
CONTEST = """## Contests

These are runs of about three minutes each on development splits, with one seed (`python benchmarks/dial.py contest`,
from `results/sweep.jsonl`). qwen3 keeps the average of the last fifth. gpt2 has nanoGPT's settings and keeps its last
step. The dial's runs and those labeled "timed" used `--minutes 3`, one after the other, with warm calibration and
compiler caches. The others have as many steps as fit in three minutes. We timed them separately while the machine was
fast, and then ran them with one thread.

This is not a blind test of the dial. Its rules for tokens per weight and the cost of the head (`planning/plan.py`) come
from earlier runs of these contests.
"""
COLUMNS = """| loss | seeds | training, s | total, s | parameters | context | weights | machine | commit | command |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def numbers(name: str) -> tuple[str | int, ...]:
    """Return a sort key that puts "2-core CPU, 10 minutes" after "2-core CPU, 3 minutes"."""
    return tuple(int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name))


def mean_loss(runs: dict[int, dict[str, Any]]) -> float:
    """Return the mean loss over the seeds of a row."""
    return statistics.mean(line["loss"] for line in runs.values())


def machine(line: dict[str, Any]) -> str:
    """Describe the machine and precision of a run: a GPU by its name, a CPU with its threads."""
    processor = line.get("processor") or line["machine"]["processor"]  # older lines: all on the machine's CPU
    threads = f", {line['threads']} threads" if line.get("device", "cpu") == "cpu" else ""
    return f"{processor}{threads}, {line['dtype']}" + (", compiled" if line["compiled"] else "")


def row(runs: list[dict[str, Any]]) -> str:
    """Format a row: one command on one machine, with a run per seed."""
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
