"""Generation with drafts from the text so far, beside generation without: the speed, and whether the tokens are equal.

    python benchmarks/drafts.py FOLDER TEXT [TEXT ...] [--dtype fp32] [--temperature 0] [--tokens 200] [--prompts 5]
                                [--prompt-tokens 400] [--runs 3] [--save]

FOLDER is a model. Each prompt is a part of a TEXT (a file); `repeat` as a TEXT is a passage of the first file, written
four times. Both sides take turns; figures are tokens per second, medians of the runs over all prompts. --save appends
a line per text to results/drafts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import record
import torch

from bardlet.inference.generate import stream
from bardlet.run import hf
from bardlet.runtime.device import tune_malloc


def prompts_of(text: str, first: str, tokenizer: Any, args: argparse.Namespace) -> list[list[int]]:
    """Return prompts from evenly spread places of a text."""
    if text == "repeat":
        passage = tokenizer.encode(first[len(first) // 2 :][:2000]).tolist()[: args.prompt_tokens // 4]
        return [(passage * 5)[: args.prompt_tokens + 7 * n] for n in range(args.prompts)]
    ids = tokenizer.encode(Path(text).read_text(encoding="utf-8", errors="replace")[:2_000_000]).tolist()
    space = max(1, (len(ids) - args.prompt_tokens) // args.prompts)
    return [ids[n * space :][: args.prompt_tokens] for n in range(args.prompts)]


def main() -> None:
    """Measure each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--dtype", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()
    model, tokenizer = hf.read_folder(args.folder)
    first = Path(args.texts[0]).read_text(encoding="utf-8", errors="replace")
    sides = ("plain", "drafts")
    for text in args.texts:
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        equal = total = 0
        for run in range(args.runs):
            ids: dict[str, list[list[int]]] = {name: [] for name in sides}
            spent = dict.fromkeys(sides, 0.0)
            for number, prompt in enumerate(prompts_of(text, first, tokenizer, args)):
                for name in sides:
                    steps = stream(model, [prompt], args.tokens, temperature=args.temperature,
                                   seed=[1000 * run + number], dtype=torch.int8 if args.dtype == "int8" else None,
                                   drafts=name == "drafts")
                    written = [next(steps)[0]]  # the prompt has been read
                    started = time.perf_counter()
                    written += [step[0] for step in steps]
                    spent[name] += time.perf_counter() - started
                    ids[name].append([token or 0 for token in written])
            total += sum(map(len, ids["plain"]))
            equal += sum(a == b for pair in zip(ids["plain"], ids["drafts"], strict=True)
                         for a, b in zip(*pair, strict=True))
            for name in sides:
                seconds[name].append(spent[name])
        count = args.prompts * (args.tokens - 1)
        speed = {name: count / statistics.median(each) for name, each in seconds.items()}
        figures = {"model": args.folder.name, "text": Path(text).name, "dtype": args.dtype,
                   "temperature": args.temperature,
                   "tokens": args.tokens, "prompts": args.prompts, "runs": args.runs, "threads": args.threads,
                   "tokens_per_second": {name: round(each, 1) for name, each in speed.items()},
                   "ratio": round(speed["drafts"] / speed["plain"], 3), "same_tokens": f"{equal}/{total}"}
        print(json.dumps(figures), flush=True)
        if args.save:
            record.append("drafts", figures)


if __name__ == "__main__":
    main()
