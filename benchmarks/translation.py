"""Translation: BLEU of training runs, a comparison of three models, and speed compared with transformers.

    python benchmarks/translation.py run PAIR [--seeds 3] [--first-seed 1337] [--beam 5] [--out DIR] -- [settings]
    python benchmarks/translation.py compare [--pair de-en] [--minutes 10] [--no-save] -- [settings]
    python benchmarks/translation.py speed DIR [--beam 1 --beam 5] [--batch 64] [--runs 5] [--no-save]
    python benchmarks/translation.py tables
    python benchmarks/translation.py publish DIR

`run` trains with the command line, one process per seed. It measures lowercased BLEU and chrF on test_2016_flickr, and
on test_2017_flickr if present, greedy and with beam search. No choice was based on either test set. --out keeps the
runs as DIR/PAIR-SEED. `compare` does the same for three models with about as many parameters and the same minutes: the
encoder-decoder, a decoder-only model, and one with bidirectional attention on the source (--prefix-lm).

`speed` translates the test lines with `bardlet.inference.translate` and with transformers' `generate`, in fp32 and (if
the processor supports it) in bf16, from the same folder with the same batch size, in turn (A B C D A ...). It also
counts the translations that agree.

All three append lines to results/translation.jsonl. `tables` prints them, and `publish` writes them to the course
(docs/), with pictures of the three masks and of the cross-attention of the run DIR. Needs multi30k in $BARDLET_DATA.
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

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # for both sides, as the command line does
TESTS = ("test_2016_flickr", "test_2017_flickr")
MODELS = {  # about as many weights: 3 encoder blocks of 12 C^2 and 3 decoder blocks of 16 C^2, or 7 blocks of 12 C^2
    "encoder-decoder": ["--model", "encdec", "--n-layer", "3"],
    "decoder only": ["--model", "gpt2", "--n-layer", "7"],
    "decoder only, prefix": ["--model", "gpt2", "--n-layer", "7", "--prefix-lm"],
}
SHAPE = ["--n-head", "4", "--n-embd", "256"]


def main() -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure several seeds")
    run.add_argument("pair")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--out", type=Path, metavar="DIR", help="keep the runs in this folder")
    compare = commands.add_parser("compare", help="compare three models with the same minutes")
    compare.add_argument("--pair", default="de-en")
    compare.add_argument("--minutes", type=float, default=10.0)
    for command in (run, compare):
        command.add_argument("--first-seed", type=int, default=1337)
        command.add_argument("--beam", type=int, default=5)
    speed = commands.add_parser("speed", help="compare sentences per second with transformers")
    speed.add_argument("folder", metavar="DIR")
    speed.add_argument("--pair", default="de-en")
    speed.add_argument("--beam", type=int, action="append", help="repeatable; default: 1 and 5")
    speed.add_argument("--batch", type=int, default=64)
    speed.add_argument("--runs", type=int, default=5)
    for command in (run, compare, speed):
        command.add_argument("--no-save", action="store_true", help="print only")
    commands.add_parser("tables", help="print the results so far")
    commands.add_parser("publish", help="write the results to the course").add_argument("folder", metavar="DIR")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, settings = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if args.command == "tables":
        print("\n\n".join(tables().values()))
        return
    if args.command == "publish":
        publish(Path(args.folder))
        return
    if args.command == "run":
        lines = ({"kind": "run", "pair": args.pair, "arguments": settings,
                  **train_and_score(args.pair, [*settings, "--seed", str(seed)], args.beam,
                                    args.out and args.out / f"{args.pair}-{seed}")}
                 for seed in range(args.first_seed, args.first_seed + args.seeds))
    elif args.command == "compare":
        minutes = ["--minutes", str(args.minutes), "--seed", str(args.first_seed)]
        lines = ({"kind": "compare", "pair": args.pair, "minutes": args.minutes, "arguments": settings, "what": name,
                  **train_and_score(args.pair, [*model, *SHAPE, *minutes, *settings], args.beam)}
                 for name, model in MODELS.items())
    else:
        lines = (compare_speed(args, beams) for beams in args.beam or [1, 5])
    for figures in lines:
        print(json.dumps(figures), flush=True)
        if not args.no_save:
            record.append("translation", figures)


def read_lines(part: str, language: str) -> list[str]:
    """Return the lowercased lines of a part of multi30k."""
    path = Path(os.environ["BARDLET_DATA"]) / "multi30k" / f"{part}.{language}.gz"
    return gzip.open(path, "rt", encoding="utf-8").read().lower().removesuffix("\n").split("\n")


# ---------------------------------------------------------------- training


def train_and_score(pair: str, arguments: list[str], beams: int, keep: Path | None = None) -> dict[str, Any]:
    """Train with `bardlet train`, with the run folder `keep` if given, and score the model on the test sets."""
    from bardlet.config.toml import non_default
    from bardlet.run import folder as run_folder

    with tempfile.TemporaryDirectory() as scratch:
        out = keep or Path(scratch) / "run"
        command = [sys.executable, "-m", "bardlet", "train", "--pair", pair, *arguments, "--out", str(out), "--json"]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        wall = time.monotonic() - started
        if done.returncode:
            sys.exit(f"{' '.join(command[2:])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        config, run_record = run_folder.settings(out)
        figures = {"settings": non_default(config), "seed": config.seed, "model": config.model,
                   "prefix_lm": config.prefix_lm, "parameters": result["parameters"],
                   "whole": round(wall, 1), "seconds": result["seconds"],
                   "steps": result["steps"], "epochs": round(result["steps"] / run_record["batches"], 1),
                   "tokens_per_second": result["tokens_per_second"], "compiled": run_record["machine"]["compiled"],
                   "selected_by": result["selected_by"], "val_loss": result["val_loss"], "val_bleu": result["bleu"]}
        return figures | scores(out, pair, beams)


def scores(folder: Path, pair: str, beams: int) -> dict[str, Any]:
    """Return BLEU and chrF on the test sets, greedy and with `beams` beams."""
    from bardlet.api import models
    from bardlet.evaluation import metrics

    model = models.load(folder, device="cpu")
    source, target = pair.split("-")
    results: dict[str, Any] = {}
    for part in TESTS:
        try:
            sources, references = read_lines(part, source), read_lines(part, target)
        except FileNotFoundError:
            continue
        for number in (1, beams):
            score = metrics.translation_score(model.translate(sources, beam=number), references, lowercase=True)
            name = f"{part} {'greedy' if number == 1 else f'beam {number}'}"
            results[name] = {"bleu": round(score.bleu, 2), "chrf": round(score.chrf, 2)}
            results["signature"] = score.bleu_signature
    return results


# ---------------------------------------------------------------- speed


def compare_speed(args: argparse.Namespace, beams: int) -> dict[str, Any]:
    """Return the median sentences per second of each side, timed in turn, and the number of equal translations.

    transformers runs twice: on the lines in file order, and sorted by length. bardlet sorts lines by length itself;
    `generate` leaves that to its caller.
    """
    import torch
    import transformers

    from bardlet.api import models
    from bardlet.runtime.device import pick_dtype, tune_malloc

    tune_malloc()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sources = read_lines(TESTS[0], args.pair.split("-")[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    ids = [tokenizer(line).input_ids for line in sources]
    file_order = list(range(len(sources)))
    by_length = sorted(file_order, key=lambda i: (len(ids[i]), i))

    def ours(dtype: models.DType) -> Callable[[], list[str]]:
        model = models.load(args.folder, device="cpu", dtype=dtype)
        return lambda: model.translate(sources, beam=beams, batch_size=args.batch)

    def theirs(dtype: torch.dtype, order: list[int]) -> Callable[[], list[str]]:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(args.folder, dtype=dtype).eval()

        def run() -> list[str]:
            translations = [""] * len(sources)
            for start in range(0, len(order), args.batch):
                rows = order[start : start + args.batch]
                batch = tokenizer([sources[i] for i in rows], return_tensors="pt", padding=True)
                max_tokens = 2 * batch.input_ids.shape[1] + 20
                with torch.inference_mode():
                    out = model.generate(**batch, num_beams=beams, do_sample=False, max_new_tokens=max_tokens,
                                         length_penalty=1.0)  # fmt: skip
                for i, text in zip(rows, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                    translations[i] = " ".join(text.split())
            return translations

        return run

    dtypes: dict[models.DType, torch.dtype] = {"fp32": torch.float32}
    if pick_dtype("auto", torch.device("cpu")) == "bf16":
        dtypes["bf16"] = torch.bfloat16
    sides: dict[str, Callable[[], list[str]]] = {}
    for name, dtype in dtypes.items():
        sides |= {f"bardlet {name}": ours(name), f"transformers {name}": theirs(dtype, by_length),
                  f"transformers unsorted {name}": theirs(dtype, file_order)}
    translations = {side: run() for side, run in sides.items()}  # also the warm-up
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.runs):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - started)
    rate = {side: round(len(sources) / statistics.median(t), 1) for side, t in times.items()}
    references = translations["transformers fp32"]
    same = {side: sum(a == b for a, b in zip(texts, references, strict=True)) for side, texts in translations.items()}
    parameters = sum(p.numel() for p in models.load(args.folder, device="cpu").module.parameters())
    return {"kind": "speed", "pair": args.pair, "beam": beams, "batch": args.batch, "lines": len(sources),
            "parameters": parameters,
            "sentences_per_second": rate, "same_as_transformers_fp32": same, "runs": args.runs,
            "transformers": transformers.__version__}  # fmt: skip


# ---------------------------------------------------------------- tables


def tables() -> dict[str, str]:
    """Return the results so far as Markdown tables."""
    lines = record.read("translation")
    all_tables = {"runs": runs_table(lines), "compare": compare_table(lines), "speed": speed_table(lines)}
    return {name: table for name, table in all_tables.items() if table}


MACHINES = {"bf16": "AVX-512 and bf16", "fp32": "AVX2"}


def native(line: dict[str, Any]) -> str:
    """Return the precision that the line's machine supports natively; the oldest lines, which lack it, had bf16."""
    return str(line["machine"].get("native", "bf16"))


def _bleu(line: dict[str, Any], part: str, search: str) -> float | None:
    value = line.get(f"{part} {search}")
    return value["bleu"] if value else None


def runs_table(lines: list[dict[str, Any]]) -> str:
    """Return a table with a row per machine, pair and command: mean and standard deviation over the seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "run":
            groups.setdefault((native(line), line["pair"], *line["arguments"]), []).append(line)
    rows = []
    for (machine, pair, *settings), group in groups.items():
        beam = next(name.split(" ", 1)[1] for name in group[0] if name.startswith(f"{TESTS[0]} beam"))
        cells = []
        for part, search in ((TESTS[0], "greedy"), (TESTS[0], beam), (TESTS[1], "greedy"), (TESTS[1], beam)):
            values = [v for line in group if (v := _bleu(line, part, search)) is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        minutes = max(line["whole"] for line in group) / 60
        sizes = " or ".join(f"{size / 1e6:.1f} M" for size in sorted({line["parameters"] for line in group}))
        rows.append(f"| {pair} | {MACHINES[machine]} | {len(group)} | {sizes} | {minutes:.1f} | {' | '.join(cells)} | "
                    f"`{' '.join(settings)}` |")
    head = ("| pair | 2 cores with | seeds | parameters | total minutes, maximum | 2016, greedy | 2016, beams | "
            "2017, greedy | 2017, beams | settings |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")  # fmt: skip
    return head + "\n".join(rows) if rows else ""


def compare_table(lines: list[dict[str, Any]]) -> str:
    """Return a table with a row per model of the newest comparison."""
    newest = {line["what"]: line for line in lines if line["kind"] == "compare"}
    rows = [f"| {model} | {_bleu(line, TESTS[0], 'greedy'):.2f} | {line['val_bleu']:.2f} | {line['parameters']:,} | "
            f"{line['whole'] / 60:.1f} | {line['epochs']} | {line['tokens_per_second']:,.0f} |"
            for model, line in newest.items()]
    head = ("| model | BLEU, test 2016, greedy | BLEU, validation | parameters | minutes | epochs | target "
            "tokens/s |\n| --- | --- | --- | --- | --- | --- | --- |\n")
    return head + "\n".join(rows) if rows else ""


def speed_table(lines: list[dict[str, Any]]) -> str:
    """Return a table with the newest row per machine, number of beams, batch size and precision."""
    newest = {(native(line), line["beam"], line["batch"]): line for line in lines if line["kind"] == "speed"
              and "transformers unsorted fp32" in line["sentences_per_second"]}  # older lines: one batch at a time
    rows = []
    for (_, beam, batch), line in sorted(newest.items()):
        rate, same = line["sentences_per_second"], line["same_as_transformers_fp32"]
        for dtype in (name for name in ("fp32", "bf16") if f"bardlet {name}" in rate):
            ours = rate[f"bardlet {dtype}"]
            theirs = [rate.get(f"transformers {order}{dtype}") for order in ("unsorted ", "")]
            cells = " | ".join(f"{their:,.0f} ({ours / their:.1f} x)" if their else "" for their in theirs)
            rows.append(f"| {MACHINES[native(line)]} | {beam} | {batch} | {dtype} | {ours:,.0f} | {cells} | "
                        f"{same[f'bardlet {dtype}']:,} of {line['lines']:,} |")  # fmt: skip
    head = ("| 2 cores with | beams | batch | dtype | bardlet, sentences/s | transformers (bardlet's speedup) | "
            "transformers, sorted lines (speedup) | same translations as transformers fp32 |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |\n")  # fmt: skip
    return head + "\n".join(rows) if rows else ""


# ---------------------------------------------------------------- the course

SENTENCE = "zwei kinder spielen mit einem kleinen hund im garten ."


def publish(folder: Path) -> None:
    """Write docs/translation.json and the pictures of the page, from the results and the run `folder`."""
    from bardlet.api import models
    from bardlet.inference import translate
    from bardlet.ladder import pictures

    docs = record.HERE.parent / "docs"
    model = models.load(folder, device="cpu")
    text = model.translate([SENTENCE])[0]
    maps, source, target = translate.cross_attention(model.module, model.tokenizer, SENTENCE,
                                                     model.translate_options(1, 1.0, 64))
    pictures.draw(docs / "figures", "encdec-masks", pictures.masks(5, 4))
    pictures.draw(docs / "figures", "encdec-attention", pictures.cross_attention(maps.mean(1), source, target))
    masked = {name: translate_from_one_token(model, index) for name, index in (("first", 0), ("last", -1))}
    entries = {**tables(), "sentence": SENTENCE, "translation": text, **masked}
    (docs / "translation.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{docs / 'translation.json'}, {docs / 'figures'}")


def translate_from_one_token(model: Any, index: int) -> str:
    """Translate SENTENCE when the decoder sees only one token of the source, the first (0) or the last (-1)."""
    from unittest.mock import patch

    from bardlet.models.encdec import EncDec, EncoderOutput

    encode = EncDec.encode

    def encode_and_mask(self: EncDec, *args: Any) -> EncoderOutput:
        output = encode(self, *args)
        output.seen[:] = False
        output.seen[..., index] = True
        return output

    with patch.object(EncDec, "encode", encode_and_mask):
        text = model.translate([SENTENCE])[0]
    return text if len(text) <= 40 else f"{text[:40]} ..."


if __name__ == "__main__":
    main()
