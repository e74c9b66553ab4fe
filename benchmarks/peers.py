"""Generation beside llama.cpp, onnxruntime, CTranslate2 and transformers, with the same weights, in turn.

    python benchmarks/peers.py [--model gpt2 --model qwen3 | --model FOLDER] [--batch 1 --batch 16] [--threads 2]
                               [--tokens 1000] [--runs 5] [--llama NODE_MODULES] [--ctranslate2 PACKAGES] [--save]

gpt2 and qwen3 are untrained models with 10.65 M parameters, 65 characters as tokens and a context of 1,024; FOLDER is a
model folder. --llama is node_modules with node-llama-cpp, --ctranslate2 a folder with its package (it runs gpt2 alone).
Each side is a process of its own with a warm model; a run writes --tokens greedy tokens after a prompt of one token,
in each of --batch rows. Figures are tokens per second over all rows, medians of --runs. The sides take turns. `rate` is
the GFLOP/s of a large fp32 product before each round. --save appends a line per model and batch to results/peers.jsonl.
"""

from __future__ import annotations

import argparse
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

HERE = Path(__file__).resolve().parent
PROMPT = [1]


def arguments() -> argparse.Namespace:
    """Parse the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="gpt2, qwen3 or a folder; repeatable; default: both")
    parser.add_argument("--batch", action="append", type=int, help="rows; repeatable; default: 1 and 16")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sides", help="only these, separated by commas")
    parser.add_argument("--llama", type=Path, metavar="NODE_MODULES")
    parser.add_argument("--ctranslate2", type=Path, metavar="PACKAGES")
    parser.add_argument("--save", action="store_true", help="append the lines to the results")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "FOLDER", "ROWS"), help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- workers


def bardlet(folder: str, rows: int, dtype: str) -> Callable[[int], list[int]]:
    """Return a function that writes a number of tokens, by bardlet."""
    import torch

    from bardlet.inference.generate import generate, stream
    from bardlet.run import hf
    from bardlet.runtime.device import tune_malloc

    tune_malloc()
    model, kind = hf.read_folder(Path(folder))[0], torch.int8 if dtype == "int8" else None
    if dtype == "drafts":
        return lambda tokens: [step[0] or 0 for step in stream(model, [PROMPT], tokens, temperature=0)]
    return lambda tokens: generate(model, [PROMPT] * rows, tokens, temperature=0, dtype=kind)[0]


def transformers(folder: str, rows: int, dtype: str) -> Callable[[int], list[int]]:
    """Return a function that writes a number of tokens, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([PROMPT] * rows)

    def write(tokens: int) -> list[int]:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
        return out[0, 1:].tolist()

    return write


def onnxruntime(folder: str, rows: int, dtype: str) -> Callable[[int], list[int]]:
    """Return a function that writes a number of tokens, by onnxruntime and bardlet's graph, with values kept inside."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = ort.InferenceSession(str(Path(folder, "onnx", "model.onnx")), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs() if each.name.startswith("past_key_values")]
    shapes = {each.name: each.shape for each in session.get_inputs()}
    outputs = [each.name for each in session.get_outputs()]

    def write(tokens: int) -> list[int]:
        ids, written = np.full((rows, 1), PROMPT[0], np.int64), []
        past = {name: ort.OrtValue.ortvalue_from_numpy(
            np.zeros((rows, shapes[name][1], 0, shapes[name][3]), np.float32)) for name in names}
        for position in range(tokens):
            binding = session.io_binding()
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", np.ones((rows, position + 1), np.int64))
            binding.bind_cpu_input("position_ids", np.full((rows, 1), position, np.int64))
            for name, value in past.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            values = dict(zip(outputs, binding.get_outputs(), strict=True))
            past = {name: values[name.replace("past_key_values", "present")] for name in names}
            ids = values["logits"].numpy()[:, -1].argmax(-1)[:, None]
            written.append(int(ids[0, 0]))
        return written

    return write


def ctranslate2(folder: str, rows: int, dtype: str) -> Callable[[int], list[int]]:
    """Return a function that writes a number of tokens, by CTranslate2."""
    import ctranslate2 as library

    folder = str(Path(folder, "ctranslate2"))
    model = library.Generator(folder, compute_type={"fp32": "float32"}.get(dtype, dtype),
                              intra_threads=int(os.environ["OMP_NUM_THREADS"]))
    names = json.loads(Path(folder, "vocabulary.json").read_text(encoding="utf-8"))

    def write(tokens: int) -> list[int]:
        done = model.generate_batch([[names[PROMPT[0]]]] * rows, max_length=tokens, min_length=tokens,
                                    include_prompt_in_result=False)
        return list(done[0].sequences_ids[0])

    return write


ENGINES = {"bardlet": bardlet, "transformers": transformers, "onnxruntime": onnxruntime, "ctranslate2": ctranslate2}


def work(side: str, folder: str, rows: int) -> None:
    """Answer requests from standard input: a number of tokens each."""
    import torch

    engine, _, dtype = side.partition(" ")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    write = ENGINES[engine](folder, rows, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        tokens = json.loads(line)["tokens"]
        started = time.perf_counter()
        ids = write(tokens)
        print(json.dumps({"seconds": time.perf_counter() - started, "ids": ids, "tokens": rows * tokens}), flush=True)


class Worker:
    """A process with one side's model."""

    def __init__(self, command: list[str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment)
        while "ready" not in (line := self._out().readline()):
            if not line:
                raise SystemExit(f"{' '.join(command)}: ended")

    def _out(self) -> Any:
        return self.process.stdout

    def run(self, tokens: int) -> dict[str, Any]:
        """Write a number of tokens per row; return {seconds, ids, tokens}."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": PROMPT, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._out().readline())
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- the comparison


def write_folder(family: str, folder: Path) -> None:
    """Write an untrained model of 10.65 M parameters as a Hugging Face folder."""
    import torch

    from bardlet import models
    from bardlet.config.pretraining import TrainConfig
    from bardlet.run import hf
    from bardlet.tokenizer import train_char

    torch.manual_seed(0)
    alphabet = "".join(map(chr, range(33, 98)))
    tokenizer = train_char(alphabet, separator=False)
    config = TrainConfig(model=family, n_layer=6, n_head=6, n_embd=384, block_size=1024).resolved()  # type: ignore[arg-type]
    model = models.build(config.model_config(tokenizer.vocab_size))
    folder.mkdir()
    hf.write_folder(folder, model, tokenizer)
    hf.write_weights(folder, model.hf_state_dict())


def export(folder: Path, to: str, dtype: str | None, out: Path) -> Path:
    """Export a folder with bardlet's command."""
    subprocess.run([sys.executable, "-m", "bardlet", "export", folder, "--to", to, "--out", out,
                    *(["--dtype", dtype] if dtype else [])], check=True, capture_output=True)
    return out


def commands(model: str, folder: Path, rows: int, args: argparse.Namespace, scratch: Path) -> dict[str, list[str]]:
    """Return the command of each side's worker."""
    own = [sys.executable, str(HERE / "peers.py"), "--worker"]
    sides = {name: [*own, name, str(folder), str(rows)]
             for name in ("bardlet fp32", "bardlet int8", "transformers fp32")}
    if rows == 1:
        sides["bardlet drafts"] = [*own, "bardlet drafts", str(folder), "1"]
    if args.llama:
        for dtype in ("f32", "q8_0"):
            file = scratch / f"{dtype}.gguf"
            file = file if file.exists() else export(folder, "gguf", dtype, file)
            sides[f"llama.cpp {dtype}"] = ["node", str(HERE / "peers_llama.mjs"), str(args.llama.resolve()), str(file),
                                           str(args.threads), str(rows), str(args.tokens + 8)]
    if model in ("gpt2", "qwen3"):
        graph = scratch / "onnx"
        graph = graph if graph.exists() else export(folder, "onnx", None, graph)
        sides["onnxruntime fp32"] = [*own, "onnxruntime fp32", str(graph), str(rows)]
    if args.ctranslate2 and model == "gpt2":
        converted = scratch / "ct2" / "ctranslate2"
        if not converted.exists():
            code = ("import sys; from ctranslate2.converters import TransformersConverter as T; "
                    "T(sys.argv[1]).convert(sys.argv[2])")
            subprocess.run([sys.executable, "-c", code, folder, converted], check=True,
                           env={**os.environ, "PYTHONPATH": str(args.ctranslate2)})
            settings = json.loads((converted / "config.json").read_text())  # it refuses special tokens that are null
            settings = {name: value or "" if name.endswith("_token") else value for name, value in settings.items()}
            (converted / "config.json").write_text(json.dumps(settings))
        for dtype in ("fp32", "int8"):
            sides[f"ctranslate2 {dtype}"] = ["env", f"PYTHONPATH={args.ctranslate2}{os.pathsep}"
                                             f"{os.environ.get('PYTHONPATH', '')}",
                                             *own, f"ctranslate2 {dtype}", str(converted.parent), str(rows)]
    chosen = args.sides.split(",") if args.sides else list(sides)
    return {name: command for name, command in sides.items() if name in chosen}


def measure(model: str, folder: Path, rows: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time all sides in turn; return a line of results."""
    import record

    workers = {name: Worker(command, args.threads) for name, command in
               commands(model, folder, rows, args, scratch).items()}
    ids = {name: worker.run(args.tokens)["ids"] for name, worker in workers.items()}
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    rates = []
    for _ in range(args.runs):
        rates.append(record.product_rate())
        for name, worker in workers.items():
            answer = worker.run(args.tokens)
            speeds[name].append(answer["tokens"] / answer["seconds"])
    for worker in workers.values():
        worker.close()
    want = ids.get("bardlet fp32", [])
    same = {name: next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), len(want))
            for name, got in ids.items()}
    return {"model": Path(model).name, "batch": rows, "threads": args.threads, "tokens": args.tokens, "runs": args.runs,
            "tokens_per_second": {name: round(statistics.median(each), 1) for name, each in speeds.items()},
            "spread": {name: [round(min(each), 1), round(max(each), 1)] for name, each in speeds.items()},
            "same_tokens": same, "rate": round(statistics.median(rates), 1)}


def main() -> None:
    """Measure each model and batch; print the figures and, with --save, append them to the results."""
    args = arguments()
    if args.worker:
        side, folder, rows = args.worker
        return work(side, folder, int(rows))
    import record
    import torch

    torch.set_num_threads(args.threads)
    for model in args.model or ("gpt2", "qwen3"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(model)
            if model in ("gpt2", "qwen3"):
                folder = Path(scratch, "model")
                write_folder(model, folder)
            for rows in args.batch or (1, 16):
                figures = measure(model, folder, rows, args, Path(scratch))
                print(json.dumps(figures), flush=True)
                if args.save:
                    record.append("peers", figures)
    return None


if __name__ == "__main__":
    main()
