"""`bardlet serve` under load: the same seed among neighbours, clients that leave, more requests than it can serve.

BARDLET_REQUESTS sets the number of requests that are compared (default: 1,000), BARDLET_LEAVES that of clients that
leave (default: 500).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.test_engine import Recorder
from live_server import HANGS, KEY, Live, Reply, leave, live, read, rest

import bardlet as api
from bardlet.inference.drawing import Sampling
from bardlet.inference.engine import Engine, EngineModel, Request
from bardlet.inference.sampling import row_seeds
from bardlet.server import protocol
from bardlet.server.app import create_app
from bardlet.server.models import Models
from bardlet.server.settings import ServerSettings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals and limits")
REQUESTS = int(os.environ.get("BARDLET_REQUESTS", "1000"))
LEAVES = int(os.environ.get("BARDLET_LEAVES", "500"))
WINDOW, NEW = 128, 200
MODEL = ["--model", "qwen3", "--tokenizer", "char", "--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size",
         str(WINDOW), "--batch-size", "8", "--steps", "150", "--dtype", "fp32", "--compile", "off"]


def train(text: Path, out: Path, *argv: str) -> Path:
    """Train a tiny model in another process, with one thread."""
    subprocess.run([sys.executable, "-m", "bardlet", "train", text, "--out", out, *MODEL, *argv], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    return train(text, tmp_path_factory.mktemp("runs") / "tiny")


def completion(prompt: str, seed: int, tokens: int = NEW, **fields: Any) -> dict[str, Any]:
    """Return a request at temperature 1."""
    return {"model": "tiny", "prompt": prompt, "seed": seed, "max_tokens": tokens, "temperature": 1.0, **fields}


def one(server: Live, body: dict[str, Any]) -> Reply:
    """Return the answer to a request that is alone."""
    reply = asyncio.run(server.ask(body))
    assert reply.status == 200 and reply.whole, reply
    return reply


# ---------------------------------------------------------------- the same seed


def prompts(text: str, number: int, chance: random.Random) -> Iterator[str]:
    """Yield prompts: a few characters, more than a slice, and past the window; a half shares a beginning.

    Of a prompt past the window the model reads the end: there, the window begins with what is shared.
    """
    def piece(length: int) -> str:
        start = chance.randrange(len(text) - length)
        return text[start : start + length]

    shared = piece(100)
    for i in range(number):
        kind, shares = i % 3, i % 2
        if kind == 0:
            yield shared[:40] + piece(chance.randint(1, 9)) if shares else piece(chance.randint(1, 40))
        elif kind == 1:
            yield shared + piece(chance.randint(1, 28)) if shares else piece(chance.randint(65, WINDOW))
        else:
            long = chance.randint(1, 300)
            yield piece(long) + shared + piece(28) if shares else piece(WINDOW + long)


GENERATE = """
import json, sys, torch
import bardlet
torch.set_num_threads(1)
folder, dtype = sys.argv[1:]
model = bardlet.load(folder, dtype=dtype)
jobs = json.load(sys.stdin)
json.dump([model.generate(prompt, tokens, temperature=1.0, top_k=None, seed=seed) for prompt, seed, tokens in jobs],
          sys.stdout)
"""


def generated(folder: Path, dtype: str, jobs: list[dict[str, Any]]) -> list[str]:
    """Return the texts of `bardlet.load(...).generate(...)` in another process."""
    asked = json.dumps([(job["prompt"], job["seed"], job["max_tokens"]) for job in jobs])
    done = subprocess.run([sys.executable, "-c", GENERATE, folder, dtype], input=asked, capture_output=True, text=True,
                          check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return list(json.loads(done.stdout))


def sampled(folder: Path, dtype: str, job: dict[str, Any]) -> str:
    """Return the text of `bardlet sample` without the prompt."""
    done = subprocess.run(
        [sys.executable, "-m", "bardlet", "sample", folder, "--prompt", job["prompt"], "--tokens",
         str(job["max_tokens"]), "--temperature", "1", "--top-k", "none", "--seed", str(job["seed"]), "--dtype", dtype,
         "--json"], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    [text] = json.loads(done.stdout.splitlines()[-1])["completions"]
    return str(text)


def engine_alone(folder: Path, dtype: str, jobs: list[dict[str, Any]]) -> Iterator[tuple[list[float], list[Any]]]:
    """Yield (log-probabilities, the likeliest tokens) of each request in an engine of this process that has seen no
    other request."""
    model = api.load(folder, dtype="int8" if dtype == "int8" else "fp32")
    kind, tokenizer = torch.int8 if dtype == "int8" else None, model.tokenizer
    engine = Engine(max_rows=1)
    try:
        for job in jobs:
            slot, recorder = engine.add(model.module.eval(), kind, 2**22), Recorder()
            engine.submit(slot, [(Request(prompt=model.prompt_ids(job["prompt"]), max_tokens=job["max_tokens"],
                                          sampling=Sampling(top_logprobs=5), seed=row_seeds(job["seed"], 1)[0]),
                                  recorder)])
            tokens = recorder.wait().tokens
            tables = [{tokenizer.decode([i]): value for i, value in [*token.top, (token.id, token.logprob)]}
                      for token in tokens]
            yield [token.logprob or 0.0 for token in tokens], tables
            while not engine.remove(slot):
                time.sleep(0.001)
    finally:
        engine.close()


async def among_neighbours(server: Live, jobs: list[dict[str, Any]], neighbours: int, text: str,
                           chance: random.Random) -> list[Reply]:
    """Return the answers to `jobs`, each asked while `neighbours` others are: jobs too, or requests of random lengths,
    some of which leave in the middle."""
    answers: dict[int, Reply] = {}
    left = list(range(len(jobs)))

    async def client() -> None:
        while len(answers) < len(jobs):
            if left and chance.random() < 0.7:
                number = left.pop()
                answers[number] = await server.ask({**jobs[number], "stream": chance.random() < 0.3})
                continue
            start, tokens = chance.randrange(len(text) - 300), chance.randint(1, 300)
            prompt = jobs[0]["prompt"] if chance.random() < 0.3 else text[start : start + chance.randint(1, 300)]
            leaves = chance.randint(0, 60) if chance.random() < 0.5 else None
            await server.ask(completion(prompt, chance.randrange(2**31), tokens, stream=True,
                                        logprobs=chance.choice((None, 0, 20))), events=leaves)

    await asyncio.gather(*(client() for _ in range(neighbours + 1)))
    return [answers[number] for number in range(len(jobs))]


def logprobs_of(reply: Reply) -> tuple[list[float], list[Any]]:
    """Return (log-probabilities, tables of the likeliest tokens) of an answer."""
    values, tables = [], []
    for event in [reply.value] if reply.value else reply.events:
        if part := event["choices"][0]["logprobs"]:
            values += part["token_logprobs"]
            tables += part["top_logprobs"]
    return values, tables


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_same_seed_among_neighbours(dtype: str, run: Path, text: Path, tmp_path: Path,
                                        record_property: Callable[[str, object], None]) -> None:
    chance, source = random.Random(dtype), text.read_text(encoding="utf-8")
    jobs = [completion(prompt, chance.randrange(2**31), logprobs=5)
            for prompt in prompts(source, REQUESTS // 2, chance)]
    texts = generated(run, dtype, jobs)
    expected = list(engine_alone(run, dtype, jobs))
    for job, want in list(zip(jobs, texts, strict=True))[:3]:
        assert sampled(run, dtype, job) == want
    with live([run], tmp_path / "log", "--dtype", dtype) as server:
        order = chance.sample(range(len(jobs)), len(jobs))
        for number in order:  # alone, though what earlier requests left may be shared
            reply = one(server, jobs[number])
            assert (reply.text, logprobs_of(reply)) == (texts[number], expected[number]), jobs[number]
        equal = 0
        for share, neighbours in enumerate((1, 7, 31)):
            numbers = order[share::3]
            replies = asyncio.run(among_neighbours(server, [jobs[n] for n in numbers], neighbours, source, chance))
            for number, reply in zip(numbers, replies, strict=True):
                assert reply.whole and len(logprobs_of(reply)[0]) == NEW
                equal += (reply.text, logprobs_of(reply)) == (texts[number], expected[number])
        server.until_idle()
    record_property("equal", f"{dtype}: {equal} of {len(jobs)}")
    print(f"\n{dtype}: {equal} of {len(jobs)} equal")
    assert equal == len(jobs)


# ---------------------------------------------------------------- clients that leave


def test_500_disconnects(run: Path, text: Path, tmp_path: Path) -> None:
    """A sequence of a client that left would run for a million tokens, and the clients that stay would wait for it."""
    chance, source = random.Random(4), text.read_text(encoding="utf-8")
    stays = [completion(prompt, seed) for seed, prompt in enumerate(prompts(source, 24, chance))]
    texts = generated(run, "fp32", stays)
    left, checked, rows = 0, 0, 8

    async def leaver(server: Live) -> None:
        nonlocal left
        while left < LEAVES:
            left += 1
            start = chance.randrange(len(source) - 300)
            body = completion(source[start : start + chance.randint(1, 300)], left, 1_000_000,
                              stream=chance.random() < 0.5)
            async with server.posted(body) as (reader, writer):
                how, seconds = chance.choice(("close", "reset", "half-close")), chance.random() * 0.2
                try:
                    async with asyncio.timeout(seconds):
                        await read(reader)
                    raise AssertionError("an endless answer ended")
                except TimeoutError:
                    leave(writer, how)
                if how == "half-close":  # the server cannot tell it from a close; it ends the connection in turn
                    async with asyncio.timeout(HANGS):  # what was read so far may end inside a line
                        rest = b""
                        with suppress(ConnectionError):
                            rest = await reader.read()
                        assert not rest.endswith(b"\r\n0\r\n\r\n")  # the last chunk of a whole stream

    async def stayer(server: Live, number: int) -> None:
        nonlocal checked
        while left < LEAVES:
            job = (number + checked) % len(stays)
            reply = await server.ask({**stays[job], "stream": bool(checked % 2)})
            assert reply.whole and reply.text == texts[job]
            checked += 1

    async def everything(server: Live) -> None:
        await asyncio.gather(*(leaver(server) for _ in range(3 * rows)), *(stayer(server, i) for i in range(rows)))

    with live([run], tmp_path / "log", "--max-rows", str(rows), "--max-waiting", "1000") as server:
        one(server, stays[0])
        asyncio.run(everything(server))
        server.until_idle()
        before = server.metric("tokens_generated_total")
        one(server, completion("the", 1, 10))
        assert server.metric("tokens_generated_total") == before + 10  # nobody else generates
        assert (tmp_path / "log").read_text() == ""
    print(f"\n{left} clients left; {checked} answers to clients that stayed, all equal")
    assert left >= LEAVES and checked


class Counting(Engine):
    """An engine that counts its steps, and notes the number at which each sequence ended."""

    steps = 0

    def __init__(self, **options: Any) -> None:
        self.ended = list[int]()
        super().__init__(**options)

    def _guarded_step(self, model: EngineModel) -> None:
        self.steps += 1
        super()._guarded_step(model)

    def _end(self, handle: Any, reason: Any, *args: Any, **options: Any) -> None:
        super()._end(handle, reason, *args, **options)
        if reason == "cancelled":
            self.ended.append(self.steps)


def test_a_slot_is_free_within_two_steps(run: Path) -> None:
    """Steps between the moment when a client leaves and the end of its sequence, for 100 of each kind, one by one.

    The server is in this process, so that the steps can be counted. A client's way to leave takes a while itself
    (its kernel, the event loop), in which another step may pass: hence the median.
    """
    engine = Counting(max_rows=8)
    settings = ServerSettings(folders=(str(run),), api_key=KEY, memory_gb=4.0, max_rows=8)
    app, started = create_app(settings, Models([str(run)], settings, engine)), threading.Event()
    with protocol.bind("127.0.0.1", 0) as listener:
        running = protocol.make_server(app, settings, app.state.traffic.stop, started.set)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        assert started.wait(HANGS)
        server: Any = Live(None, listener.getsockname()[1], Path())  # type: ignore[arg-type]
        try:
            taken = asyncio.run(leave_and_count(server, engine))
        finally:
            running.should_exit = True
            thread.join(HANGS)
    for kind, steps in taken.items():
        print(f"\n{kind}: " + ", ".join(f"{n} steps {steps.count(n)}" for n in sorted(set(steps))), end="")
    assert all(statistics.median(steps) <= 2 for steps in taken.values())


async def leave_and_count(server: Live, engine: Counting) -> dict[str, list[int]]:
    """Return the steps that sequences took to end after their client left, by the kind of request and of leaving."""
    chance, taken = random.Random(2), dict[str, list[int]]()
    endless = completion("the ", 1, 1_000_000, stream=True)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):  # the engine goes on with others
            reader, _ = await stack.enter_async_context(server.posted(endless))
            await reader.readuntil(b"data: {")
        for number in range(100):
            for kind in ("close", "reset", "half-close"):
                stream = number % 2 == 0
                before = len(engine.ended)
                async with server.posted({**endless, "stream": stream}) as (reader, writer):
                    while engine.running < 4:
                        await asyncio.sleep(0.001)
                    await asyncio.sleep(chance.random() * 0.02)
                    at = engine.steps
                    leave(writer, kind)
                    while len(engine.ended) == before:
                        await asyncio.sleep(0.001)
                taken.setdefault(f"{'streaming' if stream else 'not streaming'}, {kind}", []).append(
                    engine.ended[-1] - at)
    return taken


# ---------------------------------------------------------------- the end of the server


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_kill_in_the_middle_of_20_streams(run: Path, text: Path, tmp_path: Path) -> None:
    source = text.read_text(encoding="utf-8")
    jobs = [completion(prompt, seed) for seed, prompt in enumerate(prompts(source, 20, random.Random(8)))]
    before, texts = digests(run.parent), generated(run, "fp32", jobs)

    async def streams(server: Live) -> list[Reply]:
        begun = 0

        async def stream(job: dict[str, Any]) -> Reply:
            nonlocal begun
            async with server.posted({**job, "max_tokens": 100_000, "stream": True}) as (reader, _):
                await reader.readuntil(b"data: {")
                begun += 1
                if begun == len(jobs):
                    server.process.kill()
                async with asyncio.timeout(HANGS):
                    end = await rest(reader)
            return Reply(whole=b"[DONE]" in end or end.endswith(b"0\r\n\r\n"))

        return await asyncio.gather(*(stream(job) for job in jobs))

    with live([run], tmp_path / "log") as server:
        port = server.port
        replies = asyncio.run(streams(server))
        assert not any(reply.whole for reply in replies)
        server.process.wait(HANGS)
    assert digests(run.parent) == before
    with live([run], tmp_path / "log", port=port) as server:
        assert [one(server, job).text for job in jobs] == texts
    assert digests(run.parent) == before
    print(f"\n{len(replies)} of {len(jobs)} streams ended with an error; {len(before)} files unchanged")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_overload() -> None:
    """20 seconds of `benchmarks/serving.py --overload`: 429 and nothing else, a bounded queue, and flat memory."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "serving.py"
    done = subprocess.run([sys.executable, script, "--overload", "0.34", "--shape", "tiny"], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{figures}")
    assert figures["statuses"].keys() == {"200", "429"}
    assert figures["retry_after_s"][0] >= 1 and figures["retry_after_s"][1] <= 60
    assert figures["longest_queue"] <= figures["waiting"] and figures["most_rows"] == figures["rows"]
    assert figures["mb_end"] - figures["mb_start"] < 50


# ---------------------------------------------------------------- everything else


def test_200_requests_with_the_same_long_prompt(run: Path, text: Path, tmp_path: Path) -> None:
    """The beginning is read once: nearly all of them find it in the cache; the texts are those of each alone."""
    prompt = text.read_text(encoding="utf-8")[:WINDOW]
    jobs = [completion(prompt, seed, 20) for seed in range(200)]
    texts = generated(run, "fp32", jobs)

    async def together(server: Live) -> list[Reply]:
        return await asyncio.gather(*(server.ask(job) for job in jobs))

    with live([run], tmp_path / "log") as server:
        replies = asyncio.run(together(server))
        assert [reply.text for reply in replies] == texts
        cached = [reply.value["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
        assert cached.count(WINDOW - 1) >= 150


def test_a_prompt_of_a_megabyte(run: Path, text: Path, tmp_path: Path) -> None:
    """The model reads its end; others are served meanwhile."""
    long = (text.read_text(encoding="utf-8") * 200)[: 2**20]
    jobs = [completion(long, 3), completion("the ", 4)]
    texts = generated(run, "fp32", jobs)

    async def together(server: Live) -> list[Reply]:
        return await asyncio.gather(*(server.ask(job) for job in jobs * 4))

    with live([run], tmp_path / "log") as server:
        assert [reply.text for reply in asyncio.run(together(server))] == texts * 4


def test_a_slow_reader_of_eight_choices(run: Path, tmp_path: Path) -> None:
    """It gets all its texts in the end, those of `n` seeds, and nobody waits for it."""
    body = completion("the ", 5, 3000, n=8, stream=True)

    async def slowly(server: Live) -> Reply:
        async with server.posted(body) as (reader, _):
            await asyncio.sleep(1)
            quick = await server.ask(completion("the ", 6))
            assert quick.whole
            return await read(reader)

    with live([run], tmp_path / "log") as server:
        reply = asyncio.run(slowly(server))
        assert reply.whole
        texts = ["".join(choice["text"] for event in reply.events for choice in event["choices"]
                         if choice["index"] == index) for index in range(8)]
        whole = asyncio.run(server.ask({**body, "stream": False}))
    assert [choice["text"] for choice in whole.value["choices"]] == texts
    assert [len(text) for text in texts] == [3000] * 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_streams_and_the_queue(number: signal.Signals, run: Path, tmp_path: Path) -> None:
    """Streams end with an error event and without [DONE], those that wait get a 503; the process ends at once."""

    async def everybody(server: Live) -> list[Reply]:
        body = completion("the ", 1, 1_000_000)
        tasks = [asyncio.create_task(server.ask({**body, "stream": i % 2 == 0})) for i in range(20)]
        while (server.metric("sequences_running"), server.metric("sequences_waiting")) != (4, 16):
            await asyncio.sleep(0.05)
        server.process.send_signal(number)
        return await asyncio.gather(*tasks)

    with live([run], tmp_path / "log", "--max-rows", "4") as server:
        replies = asyncio.run(everybody(server))
        assert server.process.wait(HANGS) == 128 + number
    for reply in replies:
        if reply.value is not None:
            assert (reply.status, reply.value["error"]["code"]) == (503, "stopping")
        else:
            assert not reply.whole and "error" in reply.events[-1]
    assert (tmp_path / "log").read_text().strip() == "bardlet: interrupted"


def test_a_folder_that_goes_or_changes(run: Path, text: Path, tmp_path: Path) -> None:
    """A model that is served answers while its folder is deleted; a new one of that name is served anew."""
    folder, other = tmp_path / "runs" / "tiny", train(text, tmp_path / "other", "--seed", "7")
    shutil.copytree(run, folder)
    job = completion("the ", 9)
    first, second = generated(run, "fp32", [job]) + generated(other, "fp32", [job])
    assert first != second

    async def deleted(server: Live) -> str:
        async with server.posted({**job, "max_tokens": 3000, "stream": True}) as (reader, _):
            await reader.readuntil(b"data: {")
            shutil.rmtree(folder)
            end = await rest(reader)
        assert b"data: [DONE]" in end
        gone = await server.ask(job)
        return f"{gone.status} {gone.value['error']['code']}"

    with live([tmp_path / "runs"], tmp_path / "log") as server:
        assert one(server, job).text == first
        assert asyncio.run(deleted(server)) == "404 model_not_found"
        shutil.copytree(other, folder)
        assert one(server, job).text == second
        for source, want in ((run, first), (other, second)):  # replaced while it is loaded
            shutil.copytree(source, tmp_path / "new")
            folder.rename(tmp_path / f"old-{want == first}")
            (tmp_path / "new").rename(folder)
            assert one(server, job).text == want


def test_a_run_in_training_serves_its_newest_checkpoint(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "tiny"
    job = completion("the ", 9, 60, temperature=0.0)
    command = [sys.executable, "-m", "bardlet", "train", text, "--out", out, *MODEL, "--steps", "100000",
               "--save-every", "50"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not list(out.glob("checkpoints/step-*/manifest.json")):
            assert training.poll() is None
            time.sleep(0.1)
        with live([tmp_path / "runs"], tmp_path / "log") as server:
            texts = set[str]()
            while len(texts) < 3:
                texts.add(one(server, job).text)
                time.sleep(0.2)
    finally:
        training.kill()
        training.wait()


def test_two_models_in_the_memory_of_one(run: Path, text: Path, tmp_path: Path) -> None:
    """They take turns: a 503 with Retry-After while the other one is in use, never another status or text."""
    for name in ("tiny", "other"):
        shutil.copytree(run, tmp_path / "runs" / name)
    job = completion("the ", 9)
    [text_of_job] = generated(run, "fp32", [job])
    statuses = set[int]()

    async def client(server: Live, name: str) -> None:
        got = 0
        while got < 20:
            reply = await server.ask({**job, "model": name})
            statuses.add(reply.status)
            if reply.status == 503:
                assert int(reply.headers["retry-after"]) >= 1
                await asyncio.sleep(0.02)
            else:
                assert reply.text == text_of_job
                got += 1

    async def both(server: Live) -> None:
        await asyncio.gather(*(client(server, name) for name in ("tiny", "other")))

    with live([tmp_path / "runs"], tmp_path / "log", "--memory", "0.004") as server:
        asyncio.run(both(server))
    assert statuses <= {200, 503}
