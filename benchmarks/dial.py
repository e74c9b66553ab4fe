"""The dial: does `bardlet train TEXT --minutes M` end on time, and with the loss that it expected?

    python benchmarks/dial.py run names tinyshakespeare --minutes 1 3 [--replay]
    python benchmarks/dial.py sweep eltec-fra [-- --n-embd 256 --steps 700]
    python benchmarks/dial.py law
    python benchmarks/dial.py table
    python benchmarks/dial.py contest

`run` trains each text for each of the minutes, each in a process of its own, and appends a line to results/dial.jsonl:
wall time from start to exit, the loss expected before the first step, and the loss that came, in nats per character of
the validation part. With --replay the run is repeated from its run.toml, without a clock: the weights must be the same.

`sweep` trains on the development split, by --minutes or with settings chosen by hand: a line in results/sweep.jsonl.
TEXT-shuffled is a text's training part with its documents in random order: the end of a sorted list, its development
split, is not like the rest. TEXT-short is the first 50,000 characters of a long document of a text's training part.
Those of --about 3 are printed side by side by `contest`: their steps are to be as many as three minutes have. `law`
fits what `scaling_law.COEFFICIENTS` holds to these lines by least squares, and shows how far it is off on the runs of the dial,
to which it is not fitted (though to their texts' development splits, and `scaling_law.REPEAT_DECAY` was chosen with them in
sight), and for each text how far a law fitted to the other texts alone would be. `table` prints the runs of the dial as
a table, with what they expected on their day.
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
from bardlet.data import corpus
from bardlet.data.statistics import measure_corpus
from bardlet.errors import BardletError
from bardlet.planning import plan, scaling_law
from bardlet.run import folder


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train for some minutes")
    run.add_argument("texts", nargs="+")
    run.add_argument("--minutes", type=float, nargs="+", required=True)
    run.add_argument("--seed", type=int, default=1337)
    run.add_argument("--replay", action="store_true", help="repeat each run without a clock and compare the weights")
    sweep = commands.add_parser("sweep", help="train on the development split with settings chosen by hand")
    sweep.add_argument("text")
    sweep.add_argument("--about", type=float, metavar="MINUTES", help="what the steps take, for `contest`")
    commands.add_parser("law", help="fit the law of the expected loss")
    commands.add_parser("table", help="print the runs of the dial")
    commands.add_parser("contest", help="print runs on development splits that took as long")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1:]
    if args.command == "run":
        for text in args.texts:
            for minutes in args.minutes:
                line = timed(text, minutes, args.seed, args.replay)
                print(json.dumps(line), flush=True)
                record.append("dial", line)
    elif args.command == "sweep":
        line = by_hand(args.text, words, args.about)
        print(json.dumps(line), flush=True)
        record.append("sweep", line)
    elif args.command == "law":
        law()
    elif args.command == "table":
        print(table(read("dial")))
    else:
        print(contest(read("sweep")))


def read(name: str) -> list[dict[str, Any]]:
    """The lines of results/NAME.jsonl, oldest first."""
    path = record.HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# ---------------------------------------------------------------- runs


def train(words: list[str], out: Path) -> dict[str, Any]:
    """`bardlet train WORDS` in a process of its own: what --json says."""
    command = [sys.executable, "-m", "bardlet", "train", *words, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bardlet train {' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def timed(text: str, minutes: float, seed: int, replay: bool) -> dict[str, Any]:
    """A run of the dial, and whether it can be repeated."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        begun = time.monotonic()
        train([text, "--minutes", str(minutes), "--seed", str(seed)], out)
        line: dict[str, Any] = {"minutes": minutes, "wall": round(time.monotonic() - begun, 1), **facts(out)}
        if replay:
            train(["--config", str(out / "run.toml")], Path(scratch) / "again")
            line["replayed"] = digest(out) == digest(Path(scratch) / "again")
        return line


def digest(run: Path) -> str:
    """sha256 of the weights that a run left."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def by_hand(text: str, words: list[str], about: float | None) -> dict[str, Any]:
    """A run on the development split that takes about so many minutes."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        train([source(text), "--val-part", "dev", *words], out)
        return {"arguments": words, "minutes": about, **facts(out), "text": text}


SHUFFLED, SHORT = "-shuffled", "-short"


def source(text: str) -> str:
    """What `bardlet train` is to be given for `text`: its name, or a file made of TEXT-shuffled or TEXT-short."""
    name, dash, how = text.rpartition("-")
    if dash + how not in (SHUFFLED, SHORT):
        return text
    documents = list(corpus.find((name,)).documents("train"))
    if dash + how == SHUFFLED:
        random.Random(1337).shuffle(documents)
    else:
        documents = [next(document for document in documents if len(document) >= SHORTEST)[:SHORTEST]]
    path = corpus.cache_folder() / f"{text}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return str(path)


SHORTEST = 50_000
"""Characters of a text TEXT-short."""


def facts(out: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    config, made = folder.read_run(out)
    settings = {name: value for name, value in asdict(config).items() if name in SETTINGS}
    tokens = made["steps"] * config.tokens_per_step
    said = {name: made.get(name) for name in ("text", "tokenizer", "expected", "nats_per_char", "bits_per_byte",
                                              "counting", "steps", "seconds", "tokens_per_second", "parameters",
                                              "selected_by", "averaged", "selected_step", "characters")}
    return {**said, "epochs": round(tokens / made["tokens"], 4), "tokens_of_text": made["tokens"], "settings": settings,
            "compiled": made["machine"]["compiled"]}


SETTINGS = {"model", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "block_size", "batch_size", "grad_accum",
            "dropout", "weight_decay", "lr", "muon_lr", "vocab_size", "seed", "val_part"}


# ---------------------------------------------------------------- the law


def law() -> None:
    """Least squares over the runs on development splits that the dial could have made; the error on its own runs.

    Each text counts as much as another, however many runs it has. And for each text the error of a law that was fitted
    to the other texts alone.
    """
    swept = [line for line in read("sweep") if as_planned(line) and counting(line["text"], "dev")]
    x, y = arguments(swept, "dev")
    texts = np.array([line["text"] for line in swept])
    weight = np.array([(texts == text).sum() ** -0.5 for text in texts])

    def fit(among: np.ndarray) -> np.ndarray:
        found = np.linalg.lstsq(x[among] * weight[among, None], y[among] * weight[among], rcond=None)[0]
        return np.asarray(found)

    found = fit(np.full(len(texts), True))
    print("LAW =", tuple(round(float(a), 4) for a in found))
    left_out: list[float] = []
    for text in sorted(set(texts)):
        here = texts == text
        off = np.expm1(x[here] @ fit(~here) - y[here])
        left_out.append(math.sqrt(np.mean(np.square(off))))  # one figure for each text
        print(f"{text}: {here.sum()} runs, fitted without them off by "
              + ", ".join(f"{100 * e:+.1f}" for e in off) + " %")
    print(f"root mean square of these {100 * math.sqrt(np.mean(np.square(left_out))):.1f} %")
    timed = [line for line in read("dial") if counting(line["text"], "val")]
    x, y = arguments(timed, "val")
    off = np.expm1(x @ found - y)
    for line, e in zip(timed, off, strict=True):
        print(f"dial, {line['text']}, {line['minutes']:g} minutes: {100 * e:+.1f} %")
    print(f"root mean square of these {100 * math.sqrt(np.mean(np.square(off))):.1f} %")


def arguments(lines: list[dict[str, Any]], held_out: str) -> tuple[np.ndarray, np.ndarray]:
    """What the law has to bring together: features, and the logarithm of the loss that came over counting's."""
    countings = [counting(line["text"], held_out) or () for line in lines]
    x = [scaling_law.features(c, line["characters"], line["epochs"]) for c, line in zip(countings, lines, strict=True)]
    return np.array(x), np.log([line["nats_per_char"] / c[0] for c, line in zip(countings, lines, strict=True)])


@cache
def counting(text: str, held_out: str) -> tuple[float, ...] | None:
    """What today's survey finds in a text, if anything; the lines of results have what that of their day found."""
    return measure_corpus(corpus.find((source(text),)), held_out=held_out).counting


def as_planned(line: dict[str, Any]) -> bool:
    """Whether the dial might have chosen these settings: neither too often read, nor regularised or cut otherwise.

    Not names, a sorted list (see `source`).
    """
    c, usual = from_mapping(line["settings"], "results", TrainConfig), TrainConfig()
    if line["text"] == "names" or (c.lr, c.muon_lr) != (usual.lr, usual.muon_lr):
        return False
    heart = plan.memorization(c, line["epochs"], line["tokens_of_text"])
    decay, dropout = plan.regularization(heart)
    return (heart <= 1.1 * plan.MAX_MEMORIZATION and c.dropout == dropout and 0.7 < c.weight_decay / decay < 1.5
            and line["tokenizer"] == usual_tokenizer(line["text"]))


@cache
def usual_tokenizer(text: str) -> str:
    """The kind of tokenizer that `--tokenizer auto` takes for a text."""
    seen = measure_corpus(corpus.find((source(text),)))
    return tokenizers.choose_kind(seen.characters, len(seen.alphabet))[0]


# ---------------------------------------------------------------- the table


AVERAGE = ["--keep", "average"]
"""What a run of the dial is given in a contest, whose other runs keep the average, too: the best by validation would be
chosen from a score of evaluations."""


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each run of the dial, the newest of each text, minutes and seed."""
    newest = {(line["text"], line["minutes"], line["settings"]["seed"]): line for line in lines}
    rows = ["| text | minutes | seed | wall, s | model | context | epochs | weight decay | dropout | expected | came "
            "| off | off now | commit |", "| --- " * 14 + "|"]
    for (text, minutes, seed), line in sorted(newest.items()):
        s, came, expected = line["settings"], line["nats_per_char"], line["expected"]
        said = f"{expected:.3f}" if expected else "-"
        off, off_now = (f"{100 * (loss / came - 1):+.1f} %" if loss else "-" for loss in (expected, expected_now(line)))
        rows.append(f"| {text} | {minutes:g} | {seed} | {line['wall']:.0f} | {s['n_layer']} x {s['n_embd']} "
                    f"| {s['block_size']} | {line['epochs']:.3g} | {s['weight_decay']:g} | {s['dropout']:g} "
                    f"| {said} | {came:.3f} | {off} | {off_now} | {line['commit']} |")
    return "\n".join(rows)


def expected_now(line: dict[str, Any]) -> float | None:
    """What the law of today expects of a run of the dial, knowing how much it read; None where the text is not here."""
    try:
        found = counting(line["text"], "val")
    except BardletError:
        return None
    return scaling_law.predict_loss(found, line["characters"], line["epochs"]) if found else None


def contest(lines: list[dict[str, Any]], minutes: float = 3.0) -> str:
    """For each text its runs of about so many minutes, the lowest loss first; of equal arguments the newest."""
    rows = ["| text | tokens | model | context | steps | tokens a step | rates | bits per byte | above the best |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    newest = {(line["text"], *line["arguments"]): line for line in lines if line.get("minutes") == minutes}
    runs = list(newest.values())
    for text in sorted({line["text"] for line in runs}):
        here = sorted((line for line in runs if line["text"] == text), key=lambda line: line["bits_per_byte"])
        for line in here:
            c = from_mapping(line["settings"], "results", TrainConfig)
            who = "by the clock: " if "--minutes" in line["arguments"] else ""
            if line["arguments"] == ["--minutes", f"{minutes:g}", *AVERAGE]:
                who = "**the dial:** "
            pieces = line["tokenizer"] + (f" {c.vocab_size or 0:,}" if line["tokenizer"] == "bpe" else "")
            model = f"{who}{c.model} {c.n_layer} x {c.n_embd}"
            rates = f"{c.lr:g}" + (f", Muon {c.muon_lr:g}" if c.model != "gpt2" else "")
            above = 100 * (line["bits_per_byte"] / here[0]["bits_per_byte"] - 1)
            rows.append(f"| {text} | {pieces} | {model} | {c.block_size} | {line['steps']:,} | {c.tokens_per_step:,} "
                        f"| {rates} | {line['bits_per_byte']:.4f} | {above:.1f} % |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
