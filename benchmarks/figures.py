"""The tables of figures in README.md and docs/guide/benchmarks.md, built from the lines in results/.

    python benchmarks/figures.py

rewrites each table between `<!-- figures: NAME -->` and `<!-- end -->`; NAME is a function in TABLES. A figure comes
from the newest line that matches; `tests/benchmarks/test_figures.py` builds all tables again and compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import record

ROOT = record.HERE.parent
PAGES = ("README.md", "docs/guide/benchmarks.md")
MARKED = re.compile(r"(<!-- figures: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)

Line = dict[str, Any]


def main() -> None:
    """Rewrite the tables of all pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return a page with its tables built anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def newest(name: str, **wanted: Any) -> Line:
    """Return the newest line of results/NAME.jsonl that has these values. Raise LookupError if there is none."""
    found = [line for line in record.read(name) if all(line.get(key) == value for key, value in wanted.items())]
    if not found:
        raise LookupError(f"results/{name}.jsonl has no line with {wanted}")
    return found[-1]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = [*head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))


# ---------------------------------------------------------------- generation

ENGINES = ("bardlet", "llama.cpp", "onnxruntime", "ctranslate2", "transformers")
SHOWN = {"ctranslate2": "CTranslate2"}
KINDS = {"fp32": ("fp32", "f32"), "int8": ("int8", "q8_0")}
MODELS = {"gpt2": "gpt2, 10.65 M parameters", "qwen3": "qwen3, 10.65 M parameters",
          "SmolLM2-135M-Instruct": "SmolLM2-135M"}


def engines(title: str, batch: int, threads: int, models: Iterable[str]) -> str:
    """Return the tokens per second of each engine: two rows for each model."""
    rows = []
    for model in models:
        speeds = newest("peers", model=model, batch=batch, threads=threads)["tokens_per_second"]
        for kind, names in KINDS.items():
            label = f"{MODELS[model]}, fp32" if kind == "fp32" else "... int8 (llama.cpp: q8_0)"
            found = [next((speeds[f"{engine} {name}"] for name in names if f"{engine} {name}" in speeds), None)
                     for engine in ENGINES]
            rows.append([label, *("" if speed is None else f"{speed:,.0f}" for speed in found)])
    return table([title, *(SHOWN.get(engine, engine) for engine in ENGINES)], rows)


# ---------------------------------------------------------------- LoRA


def lora() -> str:
    """Return LoRA of SmolLM2 beside TRL with peft: in bf16, then limited to AVX2."""
    rows = []
    for dtype, what in (("bf16", ""), ("fp32", "the processor limited to AVX2, weights in fp32, 64 conversations: ")):
        line = newest("vs_trl", kind="sft", lora=16, dtype=dtype)
        ours, theirs = "bardlet AdamW, 1 at a time", next(name for name in line["medians"] if name.startswith("TRL"))
        our, their = line["medians"][ours], line["medians"][theirs]
        rows += [[f"{what}tokens/s{'' if what else ', by a second pass over the conversations'}",
                  f"{their['tokens']:.0f}", f"{our['tokens']:.0f}", f"{our['tokens'] / their['tokens']:.2f}"],
                 [f"{'... ' * bool(what)}peak memory of the process, GB", f"{their['peak_gb']:.2f}",
                  f"{our['peak_gb']:.2f}", f"{our['peak_gb'] / their['peak_gb']:.2f}"]]
        if not what:
            losses = [", ".join(f"{loss:.3f}" for loss in line["runs"][side][0]["losses"]) for side in (theirs, ours)]
            rows.append(["loss of the first and of the second pass", *losses, ""])
    return table(["", "TRL", "bardlet", "bardlet / TRL"], rows)


# ---------------------------------------------------------------- translation


def translation() -> str:
    """Return sentences per second beside transformers, unsorted and sorted by length, on a machine without bf16."""
    rows = []
    for beam, label in ((1, "greedy"), (5, "beam 5")):
        speeds = newest("translation", kind="speed", beam=beam, parameters=2437632)["sentences_per_second"]
        ours, theirs, ordered = (speeds[name] for name in
                                ("bardlet fp32", "transformers unsorted fp32", "transformers fp32"))
        rows.append([f"{label}, batches of 64 lines",
                     f"transformers {theirs:.0f} ({ordered:.0f} sorted by length)", f"{ours:.0f}",
                     f"{ours / theirs:.1f} ({ours / ordered:.1f})"])
    return table(["higher is better", "peer", "bardlet", "bardlet / peer"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "one_text": lambda: engines("one text, 2 threads", 1, 2, MODELS),
    "one_text_one_thread": lambda: engines("one text, 1 thread", 1, 1, ("gpt2", "qwen3")),
    "sixteen_texts": lambda: engines("sixteen texts, 2 threads", 16, 2, ("gpt2", "qwen3")),
    "sixteen_texts_one_thread": lambda: engines("sixteen texts, 1 thread", 16, 1, ("gpt2", "qwen3")),
    "lora": lora,
    "translation": translation,
}

if __name__ == "__main__":
    main()
