"""Tokens per second of bardlet in fp32, bf16 and int8 beside transformers' `generate`, and nanoGPT's.

    python benchmarks/generation.py [--family gpt2 --family qwen3] [--batch 1 --batch 16] [--dtype fp32 --dtype int8]
                                    [--runs 5] [--tokens 1000] [--temperature 0] [--threads 2] [--nanogpt PATH] [--save]
                                    [--layers 6 --heads 6 --width 384 --block 1024 --vocab 65]

Untrained weights of 10.65 M parameters by default, rows of a prompt of one token; the peers in fp32. The sides take
turns (A B C A B C ...) after a warm-up of each; the figures are medians, all rows' tokens counted. With --temperature 0
the ids of fp32 are compared, too. With --save each family and batch appends a line to
benchmarks/results/generation.jsonl; older lines name their one dtype in `dtype`, and are of one row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

from bardlet.runtime.device import tune_malloc


def arguments() -> argparse.Namespace:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=("gpt2", "qwen3"), help="may be repeated; default: both")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--tokens", type=int, default=1000, help="new tokens of a run, below --block")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; above, both sides sample")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="torch's threads")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--block", type=int, default=1024, help="context window")
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16", "int8"), help="of ours; default: all")
    parser.add_argument("--batch", action="append", type=int, help="rows; may be repeated; default: 1 and 16")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT, to be measured beside gpt2")
    parser.add_argument("--save", action="store_true", help="append each line to the results")
    return parser.parse_args()


def write_folder(family: str, args: argparse.Namespace, folder: str) -> Any:
    """Makes an untrained model and saves it as a Hugging Face folder; returns it."""
    import torch
    from safetensors.torch import save_file

    from bardlet.config.model import ModelConfig
    from bardlet.models import build

    width, head_dim = args.width, args.width // args.heads
    # SwiGLU has three matrices: 8/3 of the width holds as many parameters as GPT-2's two of four times the width
    rest: dict[str, Any] = {"n_inner": 4 * width}
    if family == "qwen3":
        rest = {"n_inner": 8 * width // 3, "activation": "silu", "norm_eps": 1e-6}
    config = ModelConfig(
        model=family, vocab_size=args.vocab, block_size=args.block, n_layer=args.layers, n_head=args.heads,
        n_kv_head=args.heads, n_embd=width, head_dim=head_dim, **rest,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build(config).eval()
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    Path(folder, "config.json").write_text(json.dumps(model.to_hf(config) | no_ids), encoding="utf-8")
    save_file(model.hf_state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return model


def nanogpt(checkout: str, model: Any) -> Any:
    """nanoGPT's model, from a checkout, of the sizes of ours, a gpt2; speed does not depend on its weights."""
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    c = model.config
    with contextlib.redirect_stdout(sys.stderr):  # it counts its parameters aloud
        return GPT(GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                             n_embd=c.n_embd, dropout=0.0, bias=True)).eval()  # fmt: skip


def measure(family: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, `batch` rows of one prompt each."""
    import torch
    import transformers

    from bardlet.inference.generate import generate

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours = write_folder(family, args, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = {"do_sample": False}
    if args.temperature > 0:
        how = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def bardlet(dtype: torch.dtype | None) -> Callable[[], list[int]]:
        # building the decoder is in the time
        return lambda: generate(
            ours, [[1]] * batch, args.tokens, temperature=args.temperature, seed=0, dtype=dtype
        )[0]  # fmt: skip

    def run_theirs() -> list[int]:
        torch.manual_seed(0)
        prompt = torch.ones(batch, 1, dtype=torch.int64)
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens,
                              min_new_tokens=args.tokens, **how)  # fmt: skip
        return out[0, 1:].tolist()

    dtypes = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}
    sides: dict[str, tuple[Callable[[], Any], int]] = {  # how to run it, and for how many tokens a row
        f"bardlet {name}": (bardlet(dtypes[name]), args.tokens) for name in args.dtype or dtypes
    }
    sides["transformers fp32"] = run_theirs, args.tokens
    if args.nanogpt and family == "gpt2":  # some tens of tokens a second: fewer of them, in the middle of the context
        peer, context, few = nanogpt(args.nanogpt, ours), torch.ones(batch, args.tokens // 2, dtype=torch.int64), 20
        sides["nanogpt fp32"] = lambda: peer.generate(context, few, temperature=args.temperature or 1.0), few
    warm = {name: run() for name, (run, _) in sides.items()}
    same = sum(a == b for a, b in zip(warm.get("bardlet fp32", []), warm["transformers fp32"], strict=False))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.runs):
        for name, (run, _) in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    speed = {name: round(batch * sides[name][1] / statistics.median(times), 1) for name, times in seconds.items()}
    return {
        "family": family,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "block": args.block,
        "batch": batch,
        "tokens": args.tokens,
        "fewer_tokens": {name: number for name, (_, number) in sides.items() if number != args.tokens},
        "runs": args.runs,
        "temperature": args.temperature,
        "tokens_per_second": speed,
        "best": {name: round(batch * sides[name][1] / min(times), 1) for name, times in seconds.items()},
        "same_ids": same if args.temperature == 0 and "bardlet fp32" in sides else None,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measure each family; print the figures and append them to the results."""
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    tune_malloc()  # as the command line has it; it serves both sides
    for family in args.family or ("gpt2", "qwen3"):
        for batch in args.batch or (1, 16):
            figures = measure(family, batch, args)
            print(json.dumps(figures), flush=True)
            if args.save:
                record.append("generation", figures)


if __name__ == "__main__":
    main()
