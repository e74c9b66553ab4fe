"""Translation: training runs with their BLEU, three models on the same pairs, and the speed beside transformers.

    python benchmarks/translation.py run PAIR [--seeds 3] [--first-seed 1337] [--beam 5] [--out DIR] -- [settings]
    python benchmarks/translation.py compare [--pair de-en] [--minutes 10] [--no-save] -- [settings]
    python benchmarks/translation.py speed DIR [--beam 1 --beam 5] [--batch 64] [--runs 5] [--no-save]
    python benchmarks/translation.py tables
    python benchmarks/translation.py publish DIR

`run` trains by the command line, a process for each seed, and measures BLEU and chrF of test_2016_flickr, lower-cased,
greedy and with beams, and of test_2017_flickr where it is there; no choice was made on either. --out keeps the runs, as
DIR/PAIR-SEED. `compare` does so with three models of as many parameters and the same minutes: the encoder-decoder, a
decoder-only one, and one that sees its source both ways (--prefix-lm). `speed` translates the test lines by
`bardlet.inference.translate` and by `generate` of transformers, both in fp32 and bf16, from the same folder, with the
same batches, in turn (A B C D A ...), and says how many translations agree; bf16 only where the processor multiplies
so. Each appends lines to results/translation.jsonl; `tables` prints them, and `publish` writes them into the course
(docs/), with pictures of the three masks and of the cross-attention of the run DIR. $BARDLET_DATA has to hold multi30k.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # for both sides, as the command line does it
TESTS = ("test_2016_flickr", "test_2017_flickr")
RESULTS = record.HERE / "results" / "translation.jsonl"
MODELS = {  # 3 + 3 blocks of the encoder-decoder, 12 and 16 C^2 weights each, are as many as 7 of 12 C^2
    "encoder-decoder": ["--model", "encdec", "--n-layer", "3"],
    "decoder only": ["--model", "gpt2", "--n-layer", "7"],
    "decoder only, prefix": ["--model", "gpt2", "--n-layer", "7", "--prefix-lm"],
}
SHAPE = ["--n-head", "4", "--n-embd", "256"]


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure some seeds")
    run.add_argument("pair")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there")
    compare = commands.add_parser("compare", help="three models, the same minutes")
    compare.add_argument("--pair", default="de-en")
    compare.add_argument("--minutes", type=float, default=10.0)
    for one in (run, compare):
        one.add_argument("--first-seed", type=int, default=1337)
        one.add_argument("--beam", type=int, default=5)
    speed = commands.add_parser("speed", help="sentences a second beside transformers")
    speed.add_argument("folder", metavar="DIR")
    speed.add_argument("--pair", default="de-en")
    speed.add_argument("--beam", type=int, action="append", help="may be repeated; default: 1 and 5")
    speed.add_argument("--batch", type=int, default=64)
    speed.add_argument("--runs", type=int, default=5)
    for one in (run, compare, speed):
        one.add_argument("--no-save", action="store_true", help="print only")
    commands.add_parser("tables", help="print what was measured so far")
    commands.add_parser("publish", help="into the course").add_argument("folder", metavar="DIR")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if args.command == "tables":
        print("\n\n".join(tables().values()))
        return
    if args.command == "publish":
        publish(Path(args.folder))
        return
    if args.command == "run":
        made = ({"kind": "run", "pair": args.pair, "arguments": words,
                 **one_run(args.pair, [*words, "--seed", str(seed)], args.beam,
                           args.out and args.out / f"{args.pair}-{seed}")}
                for seed in range(args.first_seed, args.first_seed + args.seeds))
    elif args.command == "compare":
        minutes = ["--minutes", str(args.minutes), "--seed", str(args.first_seed)]
        made = ({"kind": "compare", "pair": args.pair, "minutes": args.minutes, "arguments": words, "what": name,
                 **one_run(args.pair, [*own, *SHAPE, *minutes, *words], args.beam)} for name, own in MODELS.items())
    else:
        made = (speeds(args, beams) for beams in args.beam or [1, 5])
    for figures in made:
        print(json.dumps(figures), flush=True)
        if not args.no_save:
            record.append("translation", figures)


def lines(part: str, language: str) -> list[str]:
    """The lines of a part of multi30k, in lower case."""
    path = Path(os.environ["BARDLET_DATA"]) / "multi30k" / f"{part}.{language}.gz"
    return gzip.open(path, "rt", encoding="utf-8").read().lower().removesuffix("\n").split("\n")


# ---------------------------------------------------------------- training


def one_run(pair: str, words: list[str], beams: int, keep: Path | None = None) -> dict[str, Any]:
    """Train by the command line, in the folder `keep` if one is given, and measure on the test files what it left."""
    from bardlet.config.toml import non_default
    from bardlet.run import folder as run_folder

    with tempfile.TemporaryDirectory() as scratch:
        out = keep or Path(scratch) / "run"
        command = [sys.executable, "-m", "bardlet", "train", "--pair", pair, *words, "--out", str(out), "--json"]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        whole = time.monotonic() - begun
        if done.returncode:
            sys.exit(f"{' '.join(command[2:])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        config, facts = run_folder.settings(out)
        figures = {"settings": non_default(config), "seed": config.seed, "model": config.model,
                   "prefix_lm": config.prefix_lm, "parameters": said["parameters"],
                   "whole": round(whole, 1), "seconds": said["seconds"],
                   "steps": said["steps"], "epochs": round(said["steps"] / facts["batches"], 1),
                   "tokens_per_second": said["tokens_per_second"], "compiled": facts["machine"]["compiled"],
                   "selected_by": said["selected_by"], "val_loss": said["val_loss"], "val_bleu": said["bleu"]}
        return figures | scores(out, pair, beams)


def scores(folder: Path, pair: str, beams: int) -> dict[str, Any]:
    """BLEU and chrF of the test files, greedy and with `beams`."""
    from bardlet.cli.translate import load
    from bardlet.evaluation import metrics
    from bardlet.inference import translate

    source, target = pair.split("-")
    found: dict[str, Any] = {}
    for part in TESTS:
        try:
            given, wanted = lines(part, source), lines(part, target)
        except FileNotFoundError:
            continue
        for number in (1, beams):
            model, tokenizer, how = load(folder, number, 1.0, 64)
            score = metrics.translation_score(translate.translate_lines(model, tokenizer, given, how), wanted, lowercase=True)
            name = f"{part} {'greedy' if number == 1 else f'beam {number}'}"
            found[name] = {"bleu": round(score.bleu, 2), "chrf": round(score.chrf, 2)}
            found["signature"] = score.bleu_signature
    return found


# ---------------------------------------------------------------- speed


def speeds(args: argparse.Namespace, beams: int) -> dict[str, Any]:
    """Sentences a second of both, in turn, medians; how many of the translations are the same.

    transformers gets its batches twice: with the lines as the file has them, and sorted by length as bardlet sorts
    them, which `generate` leaves to whoever calls it.
    """
    import torch
    import transformers

    from bardlet.cli.translate import load
    from bardlet.inference import translate
    from bardlet.runtime.device import pick_dtype, tune_malloc

    tune_malloc()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    given = lines(TESTS[0], args.pair.split("-")[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    ids = [tokenizer(line).input_ids for line in given]
    in_file = list(range(len(given)))
    by_length = sorted(in_file, key=lambda i: (len(ids[i]), i))  # as bardlet sorts them

    def ours(dtype: torch.dtype) -> Callable[[], list[str]]:
        model, tokenizer, how = load(Path(args.folder), beams, 1.0, args.batch)
        model.to(dtype)
        return lambda: translate.translate_lines(model, tokenizer, given, how)

    def theirs(dtype: torch.dtype, order: list[int]) -> Callable[[], list[str]]:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(args.folder, dtype=dtype).eval()

        def run() -> list[str]:
            made = [""] * len(given)
            for start in range(0, len(order), args.batch):
                these = order[start : start + args.batch]
                batch = tokenizer([given[i] for i in these], return_tensors="pt", padding=True)
                most = 2 * batch.input_ids.shape[1] + 20
                with torch.inference_mode():
                    out = model.generate(**batch, num_beams=beams, do_sample=False, max_new_tokens=most,
                                         length_penalty=1.0)  # fmt: skip
                for i, text in zip(these, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                    made[i] = " ".join(text.split())
            return made

        return run

    dtypes = {"fp32": torch.float32}
    if pick_dtype("auto", torch.device("cpu")) == "bf16":
        dtypes["bf16"] = torch.bfloat16
    sides: dict[str, Callable[[], list[str]]] = {}
    for word, dtype in dtypes.items():
        sides |= {f"bardlet {word}": ours(dtype), f"transformers {word}": theirs(dtype, by_length),
                  f"transformers unsorted {word}": theirs(dtype, in_file)}
    texts = {name: run() for name, run in sides.items()}  # a warm-up of each
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.runs):
        for name, run in sides.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    rate = {name: round(len(given) / statistics.median(t), 1) for name, t in times.items()}
    wanted = texts["transformers fp32"]
    same = {name: sum(a == b for a, b in zip(made, wanted, strict=True)) for name, made in texts.items()}
    return {"kind": "speed", "pair": args.pair, "beam": beams, "batch": args.batch, "lines": len(given),
            "parameters": sum(p.numel() for p in load(Path(args.folder), 1, 1.0, 1)[0].parameters()),
            "sentences_per_second": rate, "same_as_transformers_fp32": same, "runs": args.runs,
            "transformers": transformers.__version__}  # fmt: skip


# ---------------------------------------------------------------- tables


def tables() -> dict[str, str]:
    """What was measured so far, as tables in Markdown."""
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []
    made = {"runs": runs_table(found), "compare": compare_table(found), "speed": speed_table(found)}
    return {name: table for name, table in made.items() if table}


MACHINES = {"bf16": "AVX-512 and bf16", "fp32": "AVX2"}


def native(line: dict[str, Any]) -> str:
    """What the line's machine multiplies in; the first lines, which do not say so, are of one with bf16."""
    return str(line["machine"].get("native", "bf16"))


def _bleu(line: dict[str, Any], part: str, how: str) -> float | None:
    value = line.get(f"{part} {how}")
    return value["bleu"] if value else None


def runs_table(found: list[dict[str, Any]]) -> str:
    """A row for each machine, pair and command, mean and deviation over its seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in found:
        if line["kind"] == "run":
            groups.setdefault((native(line), line["pair"], *line["arguments"]), []).append(line)
    rows = []
    for (machine, pair, *words), lines_ in groups.items():
        how = next(name.split(" ", 1)[1] for name in lines_[0] if name.startswith(f"{TESTS[0]} beam"))
        cells = []
        for part, way in ((TESTS[0], "greedy"), (TESTS[0], how), (TESTS[1], "greedy"), (TESTS[1], how)):
            values = [v for line in lines_ if (v := _bleu(line, part, way)) is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        minutes = max(line["whole"] for line in lines_) / 60
        sizes = " or ".join(f"{size / 1e6:.1f} M" for size in sorted({line["parameters"] for line in lines_}))
        rows.append(f"| {pair} | {MACHINES[machine]} | {len(lines_)} | {sizes} | {minutes:.1f} | {' | '.join(cells)} | "
                    f"`{' '.join(words)}` |")
    head = ("| pair | 2 cores with | seeds | parameters | minutes at most, all in all | 2016, greedy | 2016, beams | "
            "2017, greedy | 2017, beams | settings |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")  # fmt: skip
    return head + "\n".join(rows) if rows else ""


def compare_table(found: list[dict[str, Any]]) -> str:
    """A row for each model of the newest comparison."""
    lines_ = {line["what"]: line for line in found if line["kind"] == "compare"}
    rows = [f"| {what} | {_bleu(line, TESTS[0], 'greedy')} | {line['val_bleu']} | {line['parameters']:,} | "
            f"{line['whole'] / 60:.1f} | {line['epochs']} | {line['tokens_per_second']:,.0f} |"
            for what, line in lines_.items()]
    head = ("| model | BLEU, test 2016, greedy | BLEU, validation | parameters | minutes | times the pairs | target "
            "tokens/s |\n| --- | --- | --- | --- | --- | --- | --- |\n")
    return head + "\n".join(rows) if rows else ""


def speed_table(found: list[dict[str, Any]]) -> str:
    """A row for each precision of each machine, batch and number of beams, the newest."""
    lines_ = {(native(line), line["beam"], line["batch"]): line for line in found if line["kind"] == "speed"}
    rows = []
    for (_, beam, batch), line in sorted(lines_.items()):
        rate, same = line["sentences_per_second"], line["same_as_transformers_fp32"]
        for dtype in (name for name in ("fp32", "bf16") if f"bardlet {name}" in rate):
            own = rate[f"bardlet {dtype}"]
            theirs = [rate.get(f"transformers {order}{dtype}") for order in ("unsorted ", "")]
            shown = " | ".join(f"{their:,.0f} ({own / their:.1f} x)" if their else "" for their in theirs)
            rows.append(f"| {MACHINES[native(line)]} | {beam} | {batch} | {dtype} | {own:,.0f} | {shown} | "
                        f"{same[f'bardlet {dtype}']:,} of {line['lines']:,} |")  # fmt: skip
    head = ("| 2 cores with | beams | batch | dtype | bardlet, sentences/s | transformers (and how many times as many "
            "bardlet's are) | the same, lines sorted for it | the same translations as its in fp32 |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |\n")  # fmt: skip
    return head + "\n".join(rows) if rows else ""


# ---------------------------------------------------------------- the course

SENTENCE = "zwei kinder spielen mit einem kleinen hund im garten ."


def publish(folder: Path) -> None:
    """docs/translation.json and the pictures of the page, from the results and from one run."""
    from bardlet.cli.translate import load
    from bardlet.inference import translate
    from bardlet.ladder import pictures

    docs = record.HERE.parent / "docs"
    model, tokenizer, how = load(folder, 1, 1.0, 64)
    text = translate.translate_lines(model, tokenizer, [SENTENCE], how)[0]
    maps, source, target = translate.cross_attention(model, tokenizer, SENTENCE, how)
    pictures.draw(docs / "figures", "encdec-masks", pictures.masks(5, 4))
    pictures.draw(docs / "figures", "encdec-attention", pictures.cross_attention(maps.mean(1), source, target))
    hidden = {name: only(model, tokenizer, how, place) for name, place in (("first", 0), ("last", -1))}
    facts = {**tables(), "sentence": SENTENCE, "translation": text, **hidden}
    (docs / "translation.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{docs / 'translation.json'}, {docs / 'figures'}")


def only(model: Any, words: Any, how: Any, place: int) -> str:
    """What SENTENCE becomes where the decoder sees one token of the source alone, the first (0) or the last (-1)."""
    from unittest.mock import patch

    from bardlet.inference import translate
    from bardlet.models.encdec import EncDec, EncoderOutput

    encode = EncDec.encode

    def hiding(self: EncDec, *args: Any) -> EncoderOutput:
        memory = encode(self, *args)
        memory.seen[:] = False
        memory.seen[..., place] = True
        return memory

    with patch.object(EncDec, "encode", hiding):
        made = translate.translate_lines(model, words, [SENTENCE], how)[0]
    return made if len(made) <= 40 else f"{made[:40]} ..."


if __name__ == "__main__":
    main()
