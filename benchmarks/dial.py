"""The dial: does `bardlet train TEXT --minutes M` end on time, and with the predicted loss?

    python benchmarks/dial.py run names tinyshakespeare --minutes 1 3 [--replay]
    python benchmarks/dial.py sweep eltec-fra [-- --n-embd 256 --steps 700]
    python benchmarks/dial.py law
    python benchmarks/dial.py table
    python benchmarks/dial.py contest

`run` trains on each text for each number of minutes, each in its own process, and appends a line to results/dial.jsonl:
wall time from start to exit, the loss predicted before the first step, and the final loss, in nats per character of the
validation split. With --replay it repeats the run from its run.toml, without a clock: the weights must be identical.

`sweep` trains on the development split, with --minutes or with settings chosen by hand, and appends a line to
results/sweep.jsonl. TEXT-shuffled is the training split of a text with its documents in random order: the end of a
sorted list, its development split, is unlike the rest. TEXT-short is the first 50,000 characters of a long document of
the training split. `contest` compares the runs with --about 3, whose steps should take three minutes.

`law` fits `scaling_law.COEFFICIENTS` to the sweep by least squares. It prints the error on the runs of the dial, which
are not in the fit (though the development splits of their texts are, and `scaling_law.REPEAT_DECAY` was chosen with
these runs in sight), and for each text the error of a fit to all other texts. `table` prints the runs of the dial, with
the loss predicted at the time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import record

from bardlet import tokenizer as tokenizers
from bardlet.config.pretraining import TrainConfig
from bardlet.config.toml import from_mapping
from bardlet.data import corpus, named
from bardlet.data.statistics import measure_corpus
from bardlet.planning import plan, scaling_law
from bardlet.run import folder


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train for a number of minutes")
    run.add_argument("texts", nargs="+")
    run.add_argument("--minutes", type=float, nargs="+", required=True)
    run.add_argument("--seed", type=int, default=1337)
    run.add_argument("--replay", action="store_true", help="repeat each run without a clock and compare the weights")
    sweep = commands.add_parser("sweep", help="train on the development split with settings chosen by hand")
    sweep.add_argument("text")
    sweep.add_argument("--about", type=float, metavar="MINUTES", help="time that the steps take, for `contest`")
    commands.add_parser("law", help="fit the coefficients of the loss prediction")
    commands.add_parser("table", help="print the runs of the dial")
    commands.add_parser("contest", help="compare runs of equal time on development splits")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, train_args = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1:]
    if args.command == "run":
        for text in args.texts:
            for minutes in args.minutes:
                line = run_dial(text, minutes, args.seed, args.replay)
                print(json.dumps(line), flush=True)
                record.append("dial", line)
    elif args.command == "sweep":
        line = run_sweep(args.text, train_args, args.about)
        print(json.dumps(line), flush=True)
        record.append("sweep", line)
    elif args.command == "law":
        fit_law()
    elif args.command == "table":
        print(table(record.read("dial")))
    else:
        print(contest(record.read("sweep")))


# ---------------------------------------------------------------- runs


def train(arguments: list[str], out: Path) -> dict[str, Any]:
    """Run `bardlet train ARGUMENTS` in its own process, and return its --json output."""
    command = [sys.executable, "-m", "bardlet", "train", *arguments, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bardlet train {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_dial(text: str, minutes: float, seed: int, replay: bool) -> dict[str, Any]:
    """Train for `minutes`, and with `replay` check that the run can be repeated. Return a line of results."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        started = time.monotonic()
        train([text, "--minutes", str(minutes), "--seed", str(seed)], out)
        line: dict[str, Any] = {"minutes": minutes, "wall": round(time.monotonic() - started, 1), **summarize(out)}
        if replay:
            train(["--config", str(out / "run.toml")], Path(scratch) / "replay")
            line["replayed"] = digest(out) == digest(Path(scratch) / "replay")
        return line


def digest(run: Path) -> str:
    """Return the sha256 of a run's final weights."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def run_sweep(text: str, arguments: list[str], about: float | None) -> dict[str, Any]:
    """Train on the development split, for about `about` minutes. Return a line of results."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        train([source(text), "--val-part", "dev", *arguments], out)
        return {"arguments": arguments, "minutes": about, **summarize(out), "text": text}


SHUFFLED, SHORT = "-shuffled", "-short"


def source(text: str) -> str:
    """Return the argument of `bardlet train` for `text`: its name, or a new file for TEXT-shuffled or TEXT-short."""
    name, dash, suffix = text.rpartition("-")
    if dash + suffix not in (SHUFFLED, SHORT):
        return text
    documents = list(corpus.find((name,)).documents("train"))
    if dash + suffix == SHUFFLED:
        random.Random(1337).shuffle(documents)
    else:
        documents = [next(document for document in documents if len(document) >= SHORT_CHARACTERS)[:SHORT_CHARACTERS]]
    path = named.cache_folder() / f"{text}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return str(path)


SHORT_CHARACTERS = 50_000
"""Length of TEXT-short."""


def summarize(out: Path) -> dict[str, Any]:
    """Return settings and results of a finished run, for a line of results."""
    config, run_record = folder.read_run(out)
    settings = {name: value for name, value in asdict(config).items() if name in SETTINGS}
    tokens = run_record["steps"] * config.tokens_per_step
    recorded = {name: run_record.get(name) for name in (
        "text", "tokenizer", "expected", "nats_per_char", "bits_per_byte", "counting", "steps", "seconds",
        "tokens_per_second", "parameters", "selected_by", "averaged", "selected_step", "characters")}
    return {**recorded, "epochs": round(tokens / run_record["tokens"], 4), "tokens_of_text": run_record["tokens"],
            "settings": settings, "compiled": run_record["machine"]["compiled"]}


SETTINGS = {"model", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "block_size", "batch_size", "grad_accum",
            "dropout", "weight_decay", "lr", "muon_lr", "vocab_size", "seed", "val_part"}


# ---------------------------------------------------------------- loss prediction


def fit_law() -> None:
    """Fit the coefficients to the sweep runs that the dial could have made, and print them with their errors.

    Every text has the same weight, for any number of runs. The errors are those of fits without the text, and those on
    the runs of the dial.
    """
    swept = [line for line in record.read("sweep") if is_like_planned(line) and ngram_losses(line["text"], "dev")]
    x, y = regression_data(swept, "dev")
    texts = np.array([line["text"] for line in swept])
    weight = np.array([(texts == text).sum() ** -0.5 for text in texts])

    def fit(rows: np.ndarray) -> np.ndarray:
        solution = np.linalg.lstsq(x[rows] * weight[rows, None], y[rows] * weight[rows], rcond=None)[0]
        return np.asarray(solution)

    coefficients = fit(np.full(len(texts), True))
    print("COEFFICIENTS =", tuple(round(float(a), 4) for a in coefficients))
    per_text: list[float] = []
    for text in sorted(set(texts)):
        of_text = texts == text
        errors = np.expm1(x[of_text] @ fit(~of_text) - y[of_text])
        per_text.append(math.sqrt(np.mean(np.square(errors))))  # every text counts the same
        print(f"{text}: {of_text.sum()} runs, errors of a fit without them: "
              + ", ".join(f"{100 * e:+.1f}" for e in errors) + " %")
    print(f"root mean square {100 * math.sqrt(np.mean(np.square(per_text))):.1f} %")
    timed = [line for line in record.read("dial") if ngram_losses(line["text"], "val")]
    x, y = regression_data(timed, "val")
    errors = np.expm1(x @ coefficients - y)
    for line, e in zip(timed, errors, strict=True):
        print(f"dial, {line['text']}, {line['minutes']:g} minutes: {100 * e:+.1f} %")
    print(f"root mean square {100 * math.sqrt(np.mean(np.square(errors))):.1f} %")


def regression_data(lines: list[dict[str, Any]], held_out: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of each run, and the logarithm of its loss over the n-gram loss."""
    losses = [ngram_losses(line["text"], held_out) or () for line in lines]
    x = [scaling_law.features(c, line["characters"], line["epochs"]) for c, line in zip(losses, lines, strict=True)]
    return np.array(x), np.log([line["nats_per_char"] / c[0] for c, line in zip(losses, lines, strict=True)])


@cache
def ngram_losses(text: str, held_out: str) -> tuple[float, ...] | None:
    """Return today's n-gram statistics of a text, if any; lines of results hold those of their commit."""
    return measure_corpus(corpus.find((source(text),)), val_part=held_out).counting


def is_like_planned(line: dict[str, Any]) -> bool:
    """Return True if the dial could have chosen these settings: epochs, regularization, rates and tokenizer.

    Never for names, which is a sorted list (see `source`).
    """
    c, default = from_mapping(line["settings"], "results", TrainConfig), TrainConfig()
    if line["text"] == "names" or (c.lr, c.muon_lr) != (default.lr, default.muon_lr):
        return False
    memorized = plan.memorization(c, line["epochs"], line["tokens_of_text"])
    decay, dropout = plan.regularization(memorized)
    return (memorized <= 1.1 * plan.MAX_MEMORIZATION and c.dropout == dropout and 0.7 < c.weight_decay / decay < 1.5
            and line["tokenizer"] == auto_tokenizer(line["text"]))


@cache
def auto_tokenizer(text: str) -> str:
    """Return the kind of tokenizer that `--tokenizer auto` chooses for a text."""
    statistics = measure_corpus(corpus.find((source(text),)))
    return tokenizers.choose_kind(statistics.characters, len(statistics.alphabet))[0]


# ---------------------------------------------------------------- tables


AVERAGE = ["--keep", "average"]
"""Arguments of the dial's runs in a contest. All runs there keep the average: the best weights by validation would be
selected among twenty evaluations."""


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the dial's runs, the newest per text, minutes and seed."""
    newest = {(line["text"], line["minutes"], line["settings"]["seed"]): line for line in lines}
    rows = ["| text | minutes | seed | wall, s | model | context | epochs | weight decay | dropout | predicted "
            "| actual | error | error now | commit |", "| --- " * 14 + "|"]
    for (text, minutes, seed), line in sorted(newest.items()):
        s, actual, predicted = line["settings"], line["nats_per_char"], line["expected"]
        prediction = f"{predicted:.3f}" if predicted else "-"
        error, error_now = (f"{100 * (loss / actual - 1):+.1f} %" if loss else "-"
                            for loss in (predicted, predict_now(line)))
        rows.append(f"| {text} | {minutes:g} | {seed} | {line['wall']:.0f} | {s['n_layer']} x {s['n_embd']} "
                    f"| {s['block_size']} | {line['epochs']:.3g} | {s['weight_decay']:g} | {s['dropout']:g} "
                    f"| {prediction} | {actual:.3f} | {error} | {error_now} | {line['commit']} |")
    return "\n".join(rows)


def predict_now(line: dict[str, Any]) -> float | None:
    """Return today's prediction for a run of the dial, given its actual epochs; None if the text is too short."""
    losses = ngram_losses(line["text"], "val")
    return scaling_law.predict_loss(losses, line["characters"], line["epochs"]) if losses else None


def contest(lines: list[dict[str, Any]], minutes: float = 3.0) -> str:
    """Return a Markdown table of each text's runs of about `minutes`, lowest loss first; the newest per arguments."""
    rows = ["| text | tokenizer | model | context | steps | tokens per step | learning rates | bits per byte "
            "| above best |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    newest = {(line["text"], *line["arguments"]): line for line in lines if line.get("minutes") == minutes}
    runs = list(newest.values())
    for text in sorted({line["text"] for line in runs}):
        ranked = sorted((line for line in runs if line["text"] == text), key=lambda line: line["bits_per_byte"])
        for line in ranked:
            c = from_mapping(line["settings"], "results", TrainConfig)
            label = "timed: " if "--minutes" in line["arguments"] else ""
            if line["arguments"] == ["--minutes", f"{minutes:g}", *AVERAGE]:
                label = "**the dial:** "
            tokenizer = line["tokenizer"] + (f" {c.vocab_size or 0:,}" if line["tokenizer"] == "bpe" else "")
            model = f"{label}{c.model} {c.n_layer} x {c.n_embd}"
            rates = f"{c.lr:g}" + (f", Muon {c.muon_lr:g}" if c.model != "gpt2" else "")
            above = 100 * (line["bits_per_byte"] / ranked[0]["bits_per_byte"] - 1)
            rows.append(f"| {text} | {tokenizer} | {model} | {c.block_size} | {line['steps']:,} "
                        f"| {c.tokens_per_step:,} | {rates} | {line['bits_per_byte']:.4f} | {above:.1f} % |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
