"""Generation speed of bardlet in fp32, bf16 and int8, compared with transformers and nanoGPT in fp32.

    python benchmarks/generation.py [--family gpt2 --family qwen3] [--batch 1 --batch 16] [--dtype fp32 --dtype int8]
                                    [--runs 5] [--tokens 1000] [--temperature 0] [--threads 2] [--nanogpt PATH] [--save]
                                    [--layers 6 --heads 6 --width 384 --block 1024 --vocab 65]

Models are untrained, with 10.65 M parameters by default; every row has a prompt of one token. After a warm-up of each,
the sides take turns (A B C A B C ...). Figures are medians, in tokens per second over all rows. With --temperature 0 it
also compares the fp32 token ids with those of transformers. --save appends a line per family and batch to
benchmarks/results/generation.jsonl. (Older lines are for one row and one dtype, named by `dtype`.)
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
    """Parse the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=("gpt2", "qwen3"), help="repeatable; default: both")
    parser.add_argument("--runs", type=int, default=5, help="timed runs per side")
    parser.add_argument("--tokens", type=int, default=1000, help="new tokens per run, fewer than --block")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above 0: sample")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads of torch")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--block", type=int, default=1024, help="context window")
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16", "int8"),
                        help="of bardlet; repeatable; default: all")
    parser.add_argument("--batch", action="append", type=int, help="rows; repeatable; default: 1 and 16")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of karpathy/nanoGPT to compare gpt2 with")
    parser.add_argument("--save", action="store_true", help="append the lines to the results")
    return parser.parse_args()


def write_folder(family: str, args: argparse.Namespace, folder: str) -> Any:
    """Return an untrained model, saved as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    from bardlet.config.model import ModelConfig
    from bardlet.models import build

    width, head_dim = args.width, args.width // args.heads
    # SwiGLU has three matrices: at 8/3 of the width, they have as many parameters as GPT-2's two at 4 times the width
    options: dict[str, Any] = {"n_inner": 4 * width}
    if family == "qwen3":
        options = {"n_inner": 8 * width // 3, "activation": "silu", "norm_eps": 1e-6}
    config = ModelConfig(
        model=family, vocab_size=args.vocab, block_size=args.block, n_layer=args.layers, n_head=args.heads,
        n_kv_head=args.heads, n_embd=width, head_dim=head_dim, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build(config).eval()
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    Path(folder, "config.json").write_text(json.dumps(model.to_hf(config) | no_ids), encoding="utf-8")
    save_file(model.hf_state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return model


def nanogpt(checkout: str, model: Any) -> Any:
    """Return nanoGPT's untrained model, from a checkout, with the sizes of `model`, a gpt2."""
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    c = model.config
    with contextlib.redirect_stdout(sys.stderr):  # it prints its number of parameters
        return GPT(GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                             n_embd=c.n_embd, dropout=0.0, bias=True)).eval()  # fmt: skip


def measure(family: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time all sides in turn, with `batch` rows; return a line of results."""
    import torch
    import transformers

    from bardlet.inference.generate import generate

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours = write_folder(family, args, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def bardlet(dtype: torch.dtype | None) -> Callable[[], list[int]]:
        # the time includes building the decoder
        return lambda: generate(
            ours, [[1]] * batch, args.tokens, temperature=args.temperature, seed=0, dtype=dtype
        )[0]  # fmt: skip

    def run_theirs() -> list[int]:
        torch.manual_seed(0)
        prompt = torch.ones(batch, 1, dtype=torch.int64)
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.tokens,
                              min_new_tokens=args.tokens, **sampling)  # fmt: skip
        return out[0, 1:].tolist()

    dtypes = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}
    sides: dict[str, tuple[Callable[[], Any], int]] = {  # a function that runs it, and its tokens per row
        f"bardlet {name}": (bardlet(dtypes[name]), args.tokens) for name in args.dtype or dtypes
    }
    sides["transformers fp32"] = run_theirs, args.tokens
    if args.nanogpt and family == "gpt2":  # slow without a cache: fewer tokens, mid-context
        peer, context, few = nanogpt(args.nanogpt, ours), torch.ones(batch, args.tokens // 2, dtype=torch.int64), 20
        sides["nanogpt fp32"] = lambda: peer.generate(context, few, temperature=args.temperature or 1.0), few
    warm = {name: run() for name, (run, _) in sides.items()}
    same = sum(a == b for a, b in zip(warm.get("bardlet fp32", []), warm["transformers fp32"], strict=False))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.runs):
        for name, (run, _) in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
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
    """Measure each family and batch; print the figures and, with --save, append them to the results."""
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    tune_malloc()  # as the command line does; it helps both sides
    for family in args.family or ("gpt2", "qwen3"):
        for batch in args.batch or (1, 16):
            figures = measure(family, batch, args)
            print(json.dumps(figures), flush=True)
            if args.save:
                record.append("generation", figures)


if __name__ == "__main__":
    main()
