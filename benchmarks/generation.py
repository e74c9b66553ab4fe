"""Tokens per second of bardlet beside transformers' `generate`, on the same Hugging Face folder, in one process.

    python benchmarks/generation.py [--family gpt2 --family qwen3] [--runs 5] [--tokens 1000] [--temperature 0]
                                    [--threads 2] [--layers 6 --heads 6 --width 384 --block 1024 --vocab 65]
                                    [--dtype float32|bfloat16] [--no-save]

Untrained weights of 10.65 M parameters by default, batch 1, a prompt of one token, fp32. The two take turns
(A B A B ...) after a warm-up of each; the figures are medians. With --temperature 0 both are greedy, and the ids are
compared, too. Each family appends one JSON line to benchmarks/results/generation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import record


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' weights")
    parser.add_argument("--no-save", action="store_true", help="print only; append nothing to the results")
    return parser.parse_args()


def write_folder(family: str, args: argparse.Namespace, folder: str) -> Any:
    """Makes an untrained model and saves it as a Hugging Face folder; returns it."""
    import torch
    from safetensors.torch import save_file

    from bardlet.config import ModelConfig
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
    return model.to(getattr(torch, args.dtype))


def measure(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn on one folder."""
    import torch
    import transformers

    from bardlet.generate import generate

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours = write_folder(family, args, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    how = {"do_sample": False}
    if args.temperature > 0:
        how = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def run_ours() -> list[int]:
        return generate(ours, [[1]], args.tokens, temperature=args.temperature, seed=0)[0]

    def run_theirs() -> list[int]:
        torch.manual_seed(0)
        prompt = torch.tensor([[1]])
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            **how,
        )
        return out[0, 1:].tolist()

    same = sum(a == b for a, b in zip(run_ours(), run_theirs(), strict=True))  # the warm-up, too
    seconds: dict[str, list[float]] = {"bardlet": [], "transformers": []}
    for _ in range(args.runs):
        for name, run in (("bardlet", run_ours), ("transformers", run_theirs)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    speed = {name: round(args.tokens / statistics.median(times), 1) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["bardlet"], seconds["transformers"], strict=True)]
    return {
        "family": family,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "block": args.block,
        "tokens": args.tokens,
        "runs": args.runs,
        "dtype": args.dtype,
        "temperature": args.temperature,
        "tokens_per_second": speed,
        "ratio": round(speed["bardlet"] / speed["transformers"], 2),
        "ratio_lowest": round(min(ratios), 2),
        "same_ids": same if args.temperature == 0 else None,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measure each family; print the figures and append them to the results."""
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    for family in args.family or ("gpt2", "qwen3"):
        figures = measure(family, args)
        print(json.dumps(figures))
        if not args.no_save:
            record.append("generation", figures)


if __name__ == "__main__":
    main()
