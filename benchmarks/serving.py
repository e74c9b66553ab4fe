"""Throughput of `bardlet serve` beside other OpenAI-compatible servers, with the same model folder.

    python benchmarks/serving.py [--shape 11m --shape 135m] [--clients 1 --clients 4 --clients 16 --clients 64]
                                 [--seconds 20] [--runs 3] [--transformers PATH] [--dtype fp32] [--save]

--transformers is a folder with the packages of transformers[serving] that this environment lacks; with it,
`transformers serve --continuous-batching` takes turns with bardlet. The models are qwen3 with random weights, and
characters as tokens (11m: 10.65 M parameters, 135m: 30 layers of 576 channels). Each client sends one streamed
completion after the other: a prompt of 50 to 100 tokens of its own, 100 new tokens at temperature 1. Figures are new
tokens per second over all clients, medians of the runs, and the median and 90th percentile of the time to the first
token. `load` is the CPU time of this program, the load generator, as a share of a core. --save appends a line per shape
and number of clients to results/serving.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 256},
    "11m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 512},
    "135m": {"n_layer": 30, "n_head": 9, "n_embd": 576, "block_size": 512}}
ALPHABET = "".join(chr(33 + i) for i in range(64)) + " "
KEY, TOKENS = "benchmark", 100


def arguments() -> argparse.Namespace:
    """Parse the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable; default: 11m and 135m")
    parser.add_argument("--clients", action="append", type=int, help="repeatable; default: 1, 4, 16 and 64")
    parser.add_argument("--seconds", type=float, default=20, help="duration of a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--transformers", type=Path, help="a folder with the packages of transformers[serving]")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "int8"), default="fp32", help="of bardlet")
    parser.add_argument("--save", action="store_true", help="append the lines to the results")
    options = parser.parse_args()
    options.shape, options.clients = options.shape or ["11m", "135m"], options.clients or [1, 4, 16, 64]
    return options


def write_folder(shape: dict[str, int], folder: Path) -> None:
    """Write an untrained qwen3 with a tokenizer of 65 characters as a Hugging Face folder."""
    import torch

    from bardlet import models
    from bardlet.config.pretraining import TrainConfig
    from bardlet.run import hf
    from bardlet.tokenizer import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.char(ALPHABET)
    model = models.build(TrainConfig(**shape).resolved().model_config(tokenizer.vocab_size))  # type: ignore[arg-type]
    hf.write_folder(folder, model, tokenizer)


# ---------------------------------------------------------------- servers


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def server(side: str, folder: Path, args: argparse.Namespace) -> Iterator[int]:
    """Run a server with the model, and yield its port once it has answered a request."""
    port = free_port()
    if side == "bardlet":
        command = [sys.executable, "-m", "bardlet", "serve", folder, "--port", str(port), "--dtype", args.dtype,
                   "--api-key", KEY, "--max-waiting", "1000"]
        environment = dict(os.environ)
    else:
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", folder,
                   "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32",
                   "--continuous-batching"]
        environment = {**os.environ, "PYTHONPATH": str(args.transformers), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        try:
            while not answers(port, folder, side):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{side} ended: {log.read().decode()[-2000:]}")
                time.sleep(0.3)
            yield port
        finally:
            process.terminate()
            process.wait()


def body(folder: Path, side: str, prompt: str, tokens: int) -> dict[str, Any]:
    """Return a request for a streamed completion."""
    model = folder.name if side == "bardlet" else str(folder)
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "stream": True}


def answers(port: int, folder: Path, side: str) -> bool:
    """Return True if the server completes a prompt: the first request also loads the model."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(
        body(folder, side, "AB", 2)).encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return b"data:" in reply.read()
    except OSError:
        return False


# ---------------------------------------------------------------- clients


async def complete(port: int, request: dict[str, Any], until: float) -> tuple[float, int]:
    """Send one request and read its stream; return (seconds to the first token, characters received by `until`)."""
    data = json.dumps(request).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEY}\r\n"
                 f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode())
    writer.write(data)
    first, characters = 0.0, 0
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"the server answered {status!r}: {(await reader.read()).decode()[-500:]}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            text = "".join(choice.get("text") or "" for choice in json.loads(line[6:]).get("choices", ()))
            if text:
                first = first or time.perf_counter() - started
                characters += len(text) * (time.perf_counter() < until)
    writer.close()
    return first, characters


async def client(number: int, port: int, folder: Path, side: str, until: float) -> list[tuple[float, int]]:
    """Send one request after the other until the time is over."""
    chance, results = random.Random(number), []
    while time.perf_counter() < until:
        prompt = "".join(chance.choices(ALPHABET, k=chance.randint(50, 100)))
        results.append(await complete(port, body(folder, side, prompt, TOKENS), until))
    return results


async def load(port: int, folder: Path, side: str, clients: int, seconds: float) -> dict[str, float]:
    """Return the figures of one run: tokens per second, and seconds to the first token."""
    started, busy = time.perf_counter(), time.process_time()
    until = started + seconds
    results = await asyncio.gather(*(client(i, port, folder, side, until) for i in range(clients)))
    firsts = sorted(first for one in results for first, _ in one if first)
    return {"tokens_per_second": sum(number for one in results for _, number in one) / seconds,
            "first_token_s": statistics.median(firsts), "first_token_90_s": firsts[int(0.9 * (len(firsts) - 1))],
            "load": (time.process_time() - busy) / (time.perf_counter() - started)}


# ---------------------------------------------------------------- all


def measure(shape: str, folder: Path, args: argparse.Namespace) -> None:
    """Measure one model: the sides take turns, run by run."""
    sides = ["bardlet", *(["transformers serve"] if args.transformers else [])]
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(args.runs):
        for side in sides:
            with server(side, folder, args) as port:
                for clients in args.clients:
                    figures = asyncio.run(load(port, folder, side, clients, args.seconds))
                    runs.setdefault((clients, side), []).append(figures)
                    print(shape, clients, side, json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)
    for clients in args.clients:
        medians = {side: {key: statistics.median(run[key] for run in runs[clients, side])
                          for key in runs[clients, side][0]} for side in sides}
        line = {"shape": shape, "clients": clients, "seconds": args.seconds, "runs": args.runs, "dtype": args.dtype,
                "new_tokens": TOKENS, "sides": medians}
        print(json.dumps(line), flush=True)
        if args.save:
            record.append("serving", line)


def main() -> None:
    """Measure all shapes."""
    args = arguments()
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "model"
            write_folder(SHAPES[shape], folder)
            measure(shape, folder, args)


if __name__ == "__main__":
    main()
