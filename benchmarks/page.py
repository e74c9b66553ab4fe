"""Speed and size of an exported page in Chromium: tokens/s, seconds to the first token, and bytes per stored weight.

    python benchmarks/page.py [--runs 3] [--record]

The models have random weights: gpt2 and qwen3 of 1.8 M and 10.65 M parameters, with 65 characters and a window of 256.
The page opens from the disk, without a network, and writes 200 tokens as soon as it can.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch

sys.path.insert(0, str(record.HERE.parent / "tests"))
from browser import CHROMIUM, Browser

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.export import html
from bardlet.tokenizer import train_char

SIZES = {"1.8 M": (4, 4, 192), "10.65 M": (6, 6, 384)}
"""(layers, heads, channels)."""
TOKENS = 200
MEASURE = f"""(async () => {{
  const frame = () => new Promise((resolve) => setTimeout(resolve, 5));
  while (!globalThis.page) await frame();
  const ready = performance.now(), set = (id, value) => {{ document.getElementById(id).value = value; }};
  set("input", "a"); set("length", {TOKENS}); set("seed", 1);
  page.submit();
  while (!page.answer.steps.length) await frame();
  const first = performance.now();
  while (page.running) await frame();
  return {{ ready, first, whole: performance.now() - ready, tokens: page.answer.steps.length }};
}})()"""


def model_of(family: str, size: str) -> Any:
    """Return a model with random weights."""
    layers, heads, channels = SIZES[size]
    rotary = family == "qwen3"
    torch.manual_seed(0)
    return models.build(ModelConfig(
        family, 65, block_size=256, n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=channels,
        head_dim=channels // heads, n_inner=8 * channels // 3 // 32 * 32 if rotary else 4 * channels,
        activation="silu" if rotary else "gelu_new")).eval()


def main() -> None:
    """Print a line per model and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="times that each page is opened")
    parser.add_argument("--record", action="store_true", help="append to results/page.jsonl")
    args = parser.parse_args()
    if CHROMIUM is None:
        parser.error("no Chromium on the path")
    tokenizer = train_char([chr(32 + n) for n in range(65)], separator=False)
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder) / "profile")
        try:
            for family in ("gpt2", "qwen3"):
                for size in SIZES:
                    for dtype in html.DTYPES:
                        line = measure(browser, model_of(family, size), tokenizer, dtype, args.runs)
                        print(f"{family} {size} {dtype}: {line}", flush=True)
                        if args.record:
                            record.append("page", {"model": family, "size": size, "dtype": dtype, **line})
        finally:
            browser.close()


def measure(browser: Browser, model: Any, tokenizer: Any, dtype: str, runs: int) -> dict[str, float]:
    """Return medians of `runs` openings of the model's page, and its size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        html.write(path, model, tokenizer, {"title": "", "notes": []}, dtype=dtype)
        seen = []
        for _ in range(runs):
            browser.open(path, 1280, "light")
            seen.append(browser.value(MEASURE))
        stored = sum(p.numel() for p in model.parameters()) * {"int8": 1, "fp16": 2, "fp32": 4}[dtype]
        median = {name: statistics.median(row[name] for row in seen) for name in seen[0]}
        return {"parameters": sum(p.numel() for p in model.parameters()), "bytes": path.stat().st_size,
                "bytes_per_stored": round((path.stat().st_size - 300_000) / stored, 3),
                "seconds_to_open": round(median["ready"] / 1000, 3),
                "seconds_to_first_token": round(median["first"] / 1000, 3),
                "tokens_per_second": round(median["tokens"] / median["whole"] * 1000, 1)}


if __name__ == "__main__":
    main()
