"""Throughput of `bardlet serve` beside other OpenAI-compatible servers, with the same model folder.

    python benchmarks/serving.py [--shape 11m --shape 135m] [--clients 1 --clients 4 --clients 16 --clients 64]
                                 [--seconds 20] [--runs 3] [--transformers PATH] [--llama PATH] [--dtype fp32] [--save]

--transformers is a folder with the packages of transformers[serving] that this environment lacks; with it,
`transformers serve --continuous-batching` takes turns with bardlet. --llama is node_modules with node-llama-cpp; with
it, llama.cpp writes as many sequences at once, from a GGUF file in f32 and without a server. The models are qwen3 with
random weights, and characters as tokens (11m: 10.65 M parameters, 135m: 30 layers of 576 channels). Each client sends
one streamed completion after the other: a prompt of 50 to 100 tokens of its own, 100 new tokens at temperature 1.
Figures are new tokens per second over all clients, medians of the runs, and the median and 90th percentile of the time
to the first token. `load` is the CPU time of this program, the load generator, as a share of a core. --save appends a
line per shape and number of clients to results/serving.jsonl.

    python benchmarks/serving.py --overload MINUTES [--shape 11m] [--dtype fp32] [--save]

asks a bardlet with 32 rows and 64 places in the queue for ten times more than that: 640 clients send one request after
the other, and half of them (--impatient) come back at once after a 429, whatever its Retry-After says. It prints the
tokens per second of windows of 10 seconds beside those of 32 clients before, the statuses, the longest queue, and the
memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    parser.add_argument("--llama", type=Path, help="node_modules with node-llama-cpp")
    parser.add_argument("--overload", type=float, metavar="MINUTES", help="measure bardlet under overload instead")
    parser.add_argument("--impatient", type=float, default=0.5, metavar="SHARE",
                        help="share of the clients that come back at once after a 429, under overload")
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
    from bardlet.tokenizer import train_char

    torch.manual_seed(0)
    tokenizer = train_char(ALPHABET, separator=False)
    model = models.build(TrainConfig(**shape).resolved().model_config(tokenizer.vocab_size))  # type: ignore[arg-type]
    folder.mkdir()
    hf.write_folder(folder, model, tokenizer)
    hf.write_weights(folder, model.hf_state_dict())


# ---------------------------------------------------------------- servers


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    pid: int

    def resident_mb(self) -> float:
        """Return the memory that the process holds, in MB (1e6 bytes); NaN where that is unknown."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return math.nan
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6

    def seconds(self) -> float:
        """Return the CPU time of the process; NaN where that is unknown."""
        try:
            user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            return math.nan
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def figure(self, name: str) -> float:
        """Return a figure of /metrics."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics",
                                         headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            lines = reply.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.split()[0] == f"bardlet_{name}"))


@contextmanager
def server(side: str, folder: Path, args: argparse.Namespace, *more: str) -> Iterator[Server]:
    """Run a server with the model, and yield it once it has answered a request. more: options of bardlet."""
    port = free_port()
    if side == "bardlet":
        command = [sys.executable, "-m", "bardlet", "serve", folder, "--port", str(port), "--dtype", args.dtype,
                   "--api-key", KEY, *(more or ("--max-waiting", "1000"))]
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
            yield Server(port, process.pid)
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


def head(port: int, length: int) -> bytes:
    """Return the head of a request."""
    return (f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").encode()


async def complete(port: int, request: dict[str, Any], until: float) -> tuple[float, int]:
    """Send one request and read its stream; return (seconds to the first token, characters received by `until`)."""
    data = json.dumps(request).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(port, len(data)) + data)
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
            "first_token_s": statistics.median(firsts), "first_token_90_s": firsts[math.ceil(0.9 * (len(firsts) - 1))],
            "load": (time.process_time() - busy) / (time.perf_counter() - started)}


def llama(file: Path, clients: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the figures of one run of llama.cpp."""
    asked = json.dumps({"clients": clients, "seconds": args.seconds, "tokens": TOKENS, "threads": os.cpu_count()})
    done = subprocess.run(["node", Path(__file__).with_name("serving_llama.mjs"), args.llama.resolve(), file],
                          input=asked, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]), load=0.0)


# ---------------------------------------------------------------- overload


ROWS, WAITING, WINDOW_S = 32, 64, 10
CLIENTS = 640
"""Ten times as many as run with two of them for each row: the queue is always full."""


@dataclass
class Flood:
    """What clients saw. windows: tokens received in each window of WINDOW_S seconds."""

    windows: Counter[int] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    waits: list[int] = field(default_factory=list)
    """Seconds that the 429s asked to wait."""
    longest_queue: float = 0.0
    most_rows: float = 0.0


async def flood(server: Server, folder: Path, clients: int, seconds: float,
                impatient: float = 0.0) -> tuple[Flood, dict[str, float]]:
    """Let clients ask until the time is over; return what they saw, and the CPU and memory of both sides."""
    seen, start = Flood(), time.perf_counter()
    until, busy, served = start + seconds, time.process_time(), server.seconds()
    memory = [server.resident_mb()]

    async def one(chance: random.Random, patient: bool) -> None:
        prompt = "".join(chance.choices(ALPHABET, k=chance.randint(50, 100)))
        data = json.dumps(body(folder, "bardlet", prompt, TOKENS)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head(server.port, len(data)) + data)
        status, wait = (await reader.readline()).split(), 0
        number = status[1].decode() if len(status) > 1 else "none"
        while (line := await reader.readline()).strip():
            name, _, value = line.partition(b":")
            wait = int(value) if name.lower() == b"retry-after" else wait
        if number == "429":
            number += "" if wait else " without Retry-After"
            seen.waits.append(wait)
        whole = number != "200"
        while line := await reader.readline():
            whole |= line.startswith(b"data: [DONE]")
            if line.startswith(b'data: {"id"'):
                text = "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                seen.windows[int((time.perf_counter() - start) // WINDOW_S)] += len(text)
        writer.close()
        if time.perf_counter() < until or whole:
            seen.statuses[number if whole else f"{number}, cut"] += 1
        if number.startswith("429"):
            await asyncio.sleep(min(wait if patient else 0.05, max(0.0, until - time.perf_counter())))

    async def client(number: int) -> None:
        chance = random.Random(number)
        await asyncio.sleep(chance.random() * min(1.0, seconds / 10))
        while time.perf_counter() < until:
            await one(chance, patient=number >= impatient * clients)

    async def watch() -> None:
        while time.perf_counter() < until:
            await asyncio.sleep(1)
            seen.longest_queue = max(seen.longest_queue, await asyncio.to_thread(server.figure, "sequences_waiting"))
            seen.most_rows = max(seen.most_rows, await asyncio.to_thread(server.figure, "sequences_running"))
            memory.append(server.resident_mb())

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    wall = time.perf_counter() - start
    return seen, {"load": (time.process_time() - busy) / wall, "server_cpu": (server.seconds() - served) / wall,
                  "mb_start": memory[min(len(memory) - 1, WINDOW_S)], "mb_end": memory[-1], "mb_most": max(memory)}


def overload(shape: str, folder: Path, args: argparse.Namespace) -> None:
    """Measure 32 clients, then ten times more than the server can serve at once."""
    seconds = 60 * args.overload
    with server("bardlet", folder, args, "--max-rows", str(ROWS), "--max-waiting", str(WAITING)) as running:
        before, _ = asyncio.run(flood(running, folder, ROWS, min(3 * WINDOW_S, max(2 * WINDOW_S, seconds / 4))))
        peak = max(rates(before))
        seen, figures = asyncio.run(flood(running, folder, CLIENTS, seconds, args.impatient))
    during = rates(seen)
    line = {"shape": shape, "dtype": args.dtype, "overload_minutes": args.overload, "clients": CLIENTS,
            "impatient": args.impatient,
            "rows": ROWS, "waiting": WAITING, "new_tokens": TOKENS, "peak_tokens_per_second": peak,
            "tokens_per_second": statistics.median(during), "slowest_window": min(during),
            "of_peak": statistics.median(during) / peak, "statuses": dict(sorted(seen.statuses.items())),
            "retry_after_s": [min(seen.waits, default=0), max(seen.waits, default=0)],
            "longest_queue": seen.longest_queue, "most_rows": seen.most_rows,
            **{name: round(value, 3) for name, value in figures.items()}}
    print(json.dumps(line), flush=True)
    if args.save:
        record.append("serving", line)


def rates(seen: Flood) -> list[float]:
    """Return the tokens per second of the whole windows but the first one, in which clients begin."""
    last = max(seen.windows, default=0)
    return [seen.windows[number] / WINDOW_S for number in range(1, last)] or [seen.windows[0] / WINDOW_S]


# ---------------------------------------------------------------- all


def measure(shape: str, folder: Path, args: argparse.Namespace) -> None:
    """Measure one model: the sides take turns, run by run."""
    sides = ["bardlet", *(["transformers serve"] if args.transformers else []), *(["llama.cpp"] if args.llama else [])]
    if args.llama:
        file = folder.with_suffix(".gguf")
        subprocess.run([sys.executable, "-m", "bardlet", "export", folder, "--to", "gguf", "--dtype", "f32", "--out",
                        file], check=True, capture_output=True)
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for _ in range(args.runs):
        for side in sides:
            if side == "llama.cpp":
                for clients in args.clients:
                    runs.setdefault((clients, side), []).append(llama(file, clients, args))
                    print(shape, clients, side, json.dumps(runs[clients, side][-1]), flush=True)
                continue
            with server(side, folder, args) as running:
                for clients in args.clients:
                    figures = asyncio.run(load(running.port, folder, side, clients, args.seconds))
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
            (measure if args.overload is None else overload)(shape, folder, args)


if __name__ == "__main__":
    main()
