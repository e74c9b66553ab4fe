"""The clients of OpenAI, for Python and JavaScript, get from `bardlet serve` what bardlet itself computes.

Variables; `make engines` prepares the folders:

    BARDLET_SERVE          a folder of `pip install --target` with the Python package openai, and what it needs
    BARDLET_NODE_MODULES   node_modules with the npm package openai
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.programs import run
from server import served
from server.served import BASE, CHAT, LETTERS, Server

import bardlet
from bardlet.cli import main
from bardlet.data import chat_template

PYTHON, NODE = os.environ.get("BARDLET_SERVE"), os.environ.get("BARDLET_NODE_MODULES")
PROGRAMS = Path(__file__).parent / "server"
PROMPT, QUESTION = "The bards of", [{"role": "user", "content": "How many birds on day 7?"}]
GREEDY: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
TALK: dict[str, Any] = {"model": CHAT, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 24}
ENDLESS = 1_000_000

Client = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.train(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    with served.serving(runs, runs.parent / "log") as server:
        yield server
        assert "internal error" not in server.log.read_text()


@pytest.fixture(params=["python", "python, asynchronous", "javascript"])
def client(request: pytest.FixtureRequest) -> Client:
    """Do calls with a client: `client(server, call, ...)`."""
    if request.param == "javascript":
        if NODE is None or not (Path(NODE) / "openai").is_dir() or shutil.which("node") is None:
            pytest.skip("needs Node.js, and BARDLET_NODE_MODULES with openai")
        command, variables = ("node", PROGRAMS / "client.mjs"), {"BARDLET_NODE_MODULES": NODE}
    else:
        if PYTHON is None:
            pytest.skip("needs BARDLET_SERVE")
        command, variables = (sys.executable, PROGRAMS / "client.py"), {"PYTHONPATH": PYTHON}

    def do(server: Server, *calls: dict[str, Any], key: str = served.KEY, retries: int = 0) -> list[dict[str, Any]]:
        body = {"url": server.url, "key": key, "retries": retries, "asynchronous": "asynchronous" in request.param,
                "calls": calls}
        results: list[dict[str, Any]] = run(*command, request=body, **variables)["results"]
        return results

    return do


@pytest.fixture(scope="module")
def base(runs: Path) -> Any:
    return bardlet.load(runs / BASE, device="cpu")


def to(path: str, *fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a call."""
    merged: dict[str, Any] = {}
    for each in fields:
        merged |= each
    return {"to": path, "fields": merged, **more}


def values(results: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the values of calls that succeeded."""
    for result in results:
        assert "error" not in result, result
    return [result["value"] for result in results]


def texts(value: Any) -> list[str]:
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in value["choices"]]


def deltas(chunk: Any) -> str:
    return "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
                   for choice in chunk["choices"])


def sampled(folder: Path, capsys: pytest.CaptureFixture[str], *options: object) -> list[str]:
    """Return what `bardlet sample` writes."""
    capsys.readouterr()
    assert main(["sample", str(folder), "--json", "--device", "cpu", *map(str, options)]) == 0
    completions: list[str] = json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]
    return completions


def test_the_types_of_the_typescript_client(server: Server, tmp_path: Path) -> None:
    """A program with every field passes the compiler, strictly, and gets what its types say."""
    compiler = Path(NODE or "") / "typescript" / "bin" / "tsc"
    if NODE is None or not compiler.is_file() or shutil.which("node") is None:
        pytest.skip("needs Node.js, and BARDLET_NODE_MODULES with openai and typescript")
    (tmp_path / "node_modules").symlink_to(NODE)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(PROGRAMS / "typed.ts", tmp_path)
    subprocess.run(["node", compiler, "--strict", "--noUncheckedIndexedAccess", "--module", "nodenext", "--target",
                    "es2022", "--types", "node", "--skipLibCheck", "typed.ts"], cwd=tmp_path, check=True)
    done = subprocess.run(["node", "typed.js", server.url, served.KEY, BASE, CHAT], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    assert json.loads(done.stdout) == {
        "choices": 4, "echoed": True, "scored": True, "reason": "length", "written": True, "counted": 5,
        "role": "assistant", "same": True, "tops": 3, "vectors": [served.CHANNELS] * 2,
        "models": sorted([BASE, CHAT, LETTERS, served.TRANSLATOR]),
        "errors": ["400 n", "404 model_not_found", "401 invalid_api_key"]}


# ---------------------------------------------------------------- completions


def test_models(client: Client, server: Server) -> None:
    listed, one, missing = client(server, to("models"), to("model", {"model": CHAT}), to("model", {"model": "none"}))
    names = {model["id"]: model for model in listed["value"]["data"]}
    assert names.keys() == {BASE, LETTERS, CHAT, served.TRANSLATOR}
    assert one["value"]["id"] == CHAT and one["value"]["object"] == "model" and one["value"]["owned_by"] == "bardlet"
    assert (missing["error"], missing["status_code"], missing["code"]) == ("NotFoundError", 404, "model_not_found")


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "top_k": 0},
                                     {"temperature": 1.5, "top_p": 0.7, "top_k": 9}], ids=str)
def test_a_seed_gives_the_texts_of_bardlet_sample(client: Client, server: Server, runs: Path, options: dict[str, Any],
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """With defaults, those of the folder; more tokens than the window; n = 3 and the same seed again, and another."""
    extra = {"extra": {"top_k": options["top_k"]}} if "top_k" in options else {}
    known = {name: value for name, value in options.items() if name != "top_k"}
    fields = {"model": BASE, "prompt": PROMPT, "max_tokens": 150, "n": 3, "seed": 11, **known}
    first, again, other, alone = values(client(
        server, to("completions", fields, **extra), to("completions", fields, **extra),
        to("completions", fields, {"seed": 12}, **extra), to("completions", fields, {"n": 1}, **extra)))
    given = [f"--{name.replace('_', '-')}={'none' if value == 0 else value}" for name, value in options.items()]
    expected = sampled(runs / BASE, capsys, "--prompt", PROMPT, "--tokens", 150, "--num", 3, "--seed", 11, *given)
    assert texts(first) == texts(again) == expected and texts(alone) == expected[:1]
    assert len(set(texts(first))) == 3 and not set(texts(other)) & set(expected)


def test_without_a_seed_the_text_is_another_each_time(client: Client, server: Server) -> None:
    fields = {**GREEDY, "temperature": 1}
    one, two = values(client(server, to("completions", fields), to("completions", fields)))
    assert texts(one) != texts(two)


def test_usage_counts_tokens(client: Client, server: Server, base: Any) -> None:
    several = {**GREEDY, "prompt": [PROMPT, "Rain"], "n": 2}
    one, more, default = values(client(server, to("completions", GREEDY), to("completions", several),
                                       to("completions", {"model": BASE, "prompt": PROMPT, "seed": 1})))
    prompts = [len(base.prompt_ids(text)) for text in (PROMPT, "Rain")]
    assert one["usage"]["prompt_tokens"] == prompts[0] and one["usage"]["completion_tokens"] == 24
    assert more["usage"]["prompt_tokens"] == sum(prompts) and more["usage"]["completion_tokens"] == 4 * 24
    assert more["usage"]["total_tokens"] == sum(prompts) + 96
    assert [choice["index"] for choice in more["choices"]] == [0, 1, 2, 3]
    assert texts(more)[0] == texts(more)[1] == texts(one)[0]
    assert default["usage"]["completion_tokens"] == 16


def test_a_text_ends_before_a_stop_string(client: Client, server: Server) -> None:
    [whole] = values(client(server, to("completions", GREEDY)))
    text = texts(whole)[0]
    stop = text[7:9]
    one, many, streamed = client(server, to("completions", GREEDY, {"stop": stop}),
                                 to("completions", GREEDY, {"stop": ["\x00never", stop]}),
                                 to("completions", GREEDY, {"stop": stop, "stream": True}))
    for value in values([one, many]):
        assert texts(value) == [text[: text.index(stop)]] and value["choices"][0]["finish_reason"] == "stop"
    assert "".join(map(deltas, streamed["chunks"])) == text[: text.index(stop)]
    assert streamed["chunks"][-1]["choices"][0]["finish_reason"] == "stop"
    assert whole["choices"][0]["finish_reason"] == "length"


def test_a_stream_is_the_answer_in_pieces(client: Client, server: Server) -> None:
    fields = {**GREEDY, "n": 2, "temperature": 1, "seed": 3, "max_tokens": 500}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole, streamed, plain = client(server, to("completions", fields), to("completions", fields, usage),
                                    to("completions", fields, {"stream": True}))
    [value], chunks = values([whole]), streamed["chunks"]
    for index in range(2):
        pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(pieces) == texts(value)[index] and len(pieces) > 1
    assert chunks[-1]["choices"] == [] and all(chunk["usage"] is None for chunk in chunks[:-1])
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == value["usage"][name]
    assert not any(chunk.get("usage") for chunk in plain["chunks"])
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["length", "length"] and len({chunk["id"] for chunk in chunks}) == 1


@torch.inference_mode()
def scores(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities after each of the ids."""
    logits_TV = model.module(torch.tensor([list(ids)]))[0]
    return torch.log_softmax(logits_TV.float(), dim=-1)


def test_log_probabilities_are_the_models_own(client: Client, server: Server, base: Any) -> None:
    """Of tokens that were drawn, with options that change the drawing; with echo those of the prompt, too."""
    fields = {**GREEDY, "temperature": 1.3, "seed": 5, "logprobs": 4, "presence_penalty": 0.5}
    drawn, echoed, scored = values(client(server, to("completions", fields), to("completions", fields, {"echo": True}),
                                          to("completions", fields, {"echo": True, "max_tokens": 0})))
    ids = base.prompt_ids(PROMPT)
    table, both, prompt = (value["choices"][0]["logprobs"] for value in (drawn, echoed, scored))
    names = {base.tokenizer.bytes_of(token): token for token in range(base.tokenizer.vocab_size)}
    new = [names[token_bytes(name)] for name in table["tokens"]]
    log_TV = scores(base, [*ids, *new])
    expected = [float(log_TV[len(ids) - 1 + n, token]) for n, token in enumerate(new)]
    assert table["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    for n, top in enumerate(table["top_logprobs"]):
        best = log_TV[len(ids) - 1 + n].topk(4).values.tolist()
        assert sorted(top.values(), reverse=True)[:4] == pytest.approx(best, abs=1e-4)
        assert top[table["tokens"][n]] == table["token_logprobs"][n] and len(top) in (4, 5)
    assert texts(echoed)[0] == PROMPT + texts(drawn)[0] and texts(scored)[0] == PROMPT
    assert both["token_logprobs"][0] is None and len(both["tokens"]) == len(ids) + 24
    before = [float(log_TV[n, token]) for n, token in enumerate(ids[1:])]
    for whole in (both, prompt):
        assert whole["token_logprobs"][1 : len(ids)] == pytest.approx(before, abs=1e-4)
    assert both["token_logprobs"][len(ids):] == pytest.approx(expected, abs=1e-4)
    for start, name in zip(both["text_offset"], both["tokens"], strict=True):
        if not name.startswith(("bytes:", "<|")):
            assert texts(echoed)[0].startswith(name, start)


def token_bytes(name: str) -> bytes:
    """Return the bytes of a token that an answer names."""
    if name.startswith("bytes:"):
        return bytes(int(byte, 16) for byte in name[len("bytes:\\x"):].split("\\x"))
    return name.encode()


def test_penalties_and_biases(client: Client, server: Server, base: Any) -> None:
    ids = base.tokenizer.encode(" ").tolist()
    plain, presence, frequency, banned, forced, many = values(client(
        server, to("completions", GREEDY), to("completions", GREEDY, {"presence_penalty": 2}),
        to("completions", GREEDY, {"frequency_penalty": 2}),
        to("completions", GREEDY, {"logit_bias": {str(ids[0]): -100}}),
        to("completions", GREEDY, {"logit_bias": {str(ids[0]): 100}}), to("completions", GREEDY, {"best_of": 1})))
    text = texts(plain)[0]
    assert texts(presence)[0] != text and texts(frequency)[0] != text and texts(many)[0] == text
    assert len(set(texts(frequency)[0])) > len(set(text))
    tokens = base.tokenizer.encode(texts(banned)[0]).tolist()
    assert ids[0] in base.tokenizer.encode(text).tolist() and ids[0] not in tokens
    assert texts(forced)[0] == " " * 24


def test_prompts_of_every_kind(client: Client, server: Server, base: Any) -> None:
    ids = base.prompt_ids(PROMPT)
    text, tokens, rows, empty, absent = values(client(
        server, to("completions", GREEDY), to("completions", GREEDY, {"prompt": ids}),
        to("completions", GREEDY, {"prompt": [ids, ids]}), to("completions", GREEDY, {"prompt": ""}),
        to("completions", GREEDY, {"prompt": "x" * 5000})))
    assert texts(text) == texts(tokens) and texts(rows) == texts(text) * 2
    assert len(texts(empty)[0]) > 3 and len(texts(absent)[0]) > 3


# ---------------------------------------------------------------- chat


def test_a_chat(client: Client, server: Server, runs: Path) -> None:
    """The answer, its pieces, its log-probabilities, usage, and its end."""
    model = bardlet.load(runs / CHAT, device="cpu")
    ids = chat_template.encode(model.tokenizer, QUESTION, add_generation_prompt=True)[0].tolist()  # type: ignore[arg-type]
    end = model.tokenizer.vocab["<|end|>"]
    logged = {"logprobs": True, "top_logprobs": 3}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    parts = [{"role": "developer", "content": "Count."},
             {"role": "user", "content": [{"type": "text", "text": "How many"}, {"type": "text", "text": "birds?"}]}]
    lines = [{"role": "system", "content": "Count."}, {"role": "user", "content": "How many\nbirds?"}]
    sampling = {"temperature": 1, "seed": 2, "n": 2}
    whole, streamed, scored, ended, older, one, two, drawn, drawn_stream = client(
        server, to("chat", TALK), to("chat", TALK, stream, logged), to("chat", TALK, logged),
        to("chat", TALK, {"logit_bias": {str(end): 100}}),
        to("chat", {**TALK, "max_tokens": 5, "max_completion_tokens": None}), to("chat", TALK, {"messages": parts}),
        to("chat", TALK, {"messages": lines}), to("chat", TALK, sampling), to("chat", TALK, sampling, stream))
    [value, with_scores, at_end, short, from_parts, from_lines, several] = values(
        [whole, scored, ended, older, one, two, drawn])
    assert value["choices"][0]["message"]["role"] == "assistant"
    assert value["usage"]["prompt_tokens"] == len(ids) and value["usage"]["completion_tokens"] == 24
    assert texts(with_scores) == texts(value) and texts(from_parts) == texts(from_lines)
    assert texts(at_end) == [""] and at_end["choices"][0]["finish_reason"] == "stop"
    assert at_end["usage"]["completion_tokens"] == 0 and short["usage"]["completion_tokens"] == 5
    assert short["choices"][0]["finish_reason"] == "length"
    content = with_scores["choices"][0]["logprobs"]["content"]
    names = {tuple(model.tokenizer.bytes_of(token)): token for token in range(model.tokenizer.vocab_size)}
    new = [names[tuple(entry["bytes"])] for entry in content]
    log_TV = scores(model, [*ids, *new])
    for n, (token, entry) in enumerate(zip(new, content, strict=True)):
        row = log_TV[len(ids) - 1 + n]
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        top = [each["logprob"] for each in entry["top_logprobs"]]
        assert top == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    chunks = streamed["chunks"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(map(deltas, chunks)) == texts(value)[0] and chunks[-1]["usage"]["total_tokens"] == len(ids) + 24
    pieces = [entry for chunk in chunks for choice in chunk["choices"]
              for entry in (choice.get("logprobs") or {}).get("content") or []]
    assert [piece["logprob"] for piece in pieces] == [entry["logprob"] for entry in content]
    assert len(set(texts(several))) == 2
    for index in range(2):
        pieces = [choice["delta"].get("content") or "" for chunk in drawn_stream["chunks"]
                  for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(pieces) == texts(several)[index]


def test_neutral_values_are_accepted(client: Client, server: Server) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "metadata": {"a": "b"},
               "store": False, "user": "me", "parallel_tool_calls": True, "modalities": ["text"], "verbosity": "medium",
               "service_tier": "auto", "reasoning_effort": "none", "prompt_cache_key": "x", "safety_identifier": "y",
               "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "stop": None, "top_p": 1}
    plain, same = values(client(server, to("chat", TALK), to("chat", TALK, neutral)))
    assert texts(plain) == texts(same)


# ---------------------------------------------------------------- embeddings


def test_embeddings(client: Client, server: Server, base: Any) -> None:
    """Without a format the packages ask for base64, and decode it."""
    inputs = ["The bards sang.", "Rain fell."]
    default, floats, raw, ids = values(client(
        server, to("embeddings", {"model": BASE, "input": inputs}),
        to("embeddings", {"model": BASE, "input": inputs, "encoding_format": "float"}),
        to("embeddings", {"model": BASE, "input": inputs, "encoding_format": "base64"}),
        to("embeddings", {"model": BASE, "input": base.prompt_ids(inputs[0]), "dimensions": served.CHANNELS})))
    rows = [row["embedding"] for row in floats["data"]]
    for number, text in enumerate(inputs):
        with torch.inference_mode():
            hidden_TC = base.module.hidden(torch.tensor([base.prompt_ids(text)]))[0]
        mean_C = torch.nn.functional.normalize(hidden_TC.mean(dim=0), dim=0)
        assert rows[number] == pytest.approx(mean_C.tolist(), abs=1e-5)
        assert default["data"][number]["embedding"] == pytest.approx(rows[number], abs=1e-6)
        packed = base64.b64decode(raw["data"][number]["embedding"])
        assert list(struct.unpack(f"<{served.CHANNELS}f", packed)) == pytest.approx(rows[number], abs=1e-6)
    assert ids["data"][0]["embedding"] == pytest.approx(rows[0], abs=1e-6)
    assert floats["usage"]["prompt_tokens"] == sum(len(base.prompt_ids(text)) for text in inputs)


# ---------------------------------------------------------------- errors


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("completions", {}, {"top_n": 3}, "top_n", "unknown_parameter"),
    ("completions", {"temperature": 3}, {}, "temperature", "invalid_value"),
    ("completions", {"n": 129}, {}, "n", "invalid_value"),
    ("completions", {"best_of": 3}, {}, "best_of", "unsupported_value"),
    ("completions", {"suffix": "end"}, {}, "suffix", "unsupported_value"),
    ("completions", {"logprobs": 21}, {}, "logprobs", "invalid_value"),
    ("completions", {"stop": list("abcde")}, {}, "stop", "invalid_value"),
    ("completions", {"prompt": [999_999]}, {}, "prompt", "invalid_value"),
    ("completions", {"model": LETTERS, "prompt": "東"}, {}, "prompt", "invalid_value"),
    ("completions", {"model": served.TRANSLATOR}, {}, "model", "model_not_supported"),
    ("chat", {"model": BASE}, {}, "model", "no_chat_template"),
    ("chat", {"messages": []}, {}, "messages", "invalid_value"),
    ("chat", {"messages": [{"role": "user", "content": "long " * 200}]}, {}, "messages", "context_length_exceeded"),
    ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}]}, {}, "tools", "unsupported_value"),
    ("chat", {"response_format": {"type": "json_object"}}, {}, "response_format.type", "unsupported_value"),
    ("chat", {"top_logprobs": 2}, {}, "top_logprobs", "invalid_value"),
    ("chat", {}, {"messages": [{"role": "user", "content": "a", "nam": "b"}]}, "messages[0].nam", "unknown_parameter"),
]


def test_refusals_name_the_field(client: Client, server: Server) -> None:
    calls = [to(path, GREEDY if path == "completions" else TALK, fields, extra=extra)
             for path, fields, extra, _, _ in REFUSED]
    for result, (_, _, _, param, code) in zip(client(server, *calls), REFUSED, strict=True):
        assert result["error"] == "BadRequestError", (param, result)
        assert (result["status_code"], result["param"], result["code"]) == (400, param, code), result
        assert result["type"] == "invalid_request_error"


def test_a_wrong_key_and_an_unknown_model(client: Client, server: Server) -> None:
    [wrong] = client(server, to("chat", TALK), key="wrong")
    assert (wrong["error"], wrong["status_code"], wrong["code"]) == ("AuthenticationError", 401, "invalid_api_key")
    [missing] = client(server, to("chat", TALK, {"model": "gpt-4"}))
    assert (missing["error"], missing["param"], missing["code"]) == ("NotFoundError", "model", "model_not_found")


def test_leaving_a_stream_frees_its_place(client: Client, server: Server) -> None:
    for path, fields in (("completions", GREEDY), ("chat", {**TALK, "max_completion_tokens": 100})):
        [result] = client(server, to(path, fields, {"stream": True, "max_tokens": ENDLESS} if path == "completions"
                                     else {"stream": True}, take=3))
        assert len(result["chunks"]) == 3 and "error" not in result
    deadline = time.monotonic() + 5
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(server) == 0


def running(server: Server) -> float:
    """Return the number of sequences that are running or waiting, of /metrics."""
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {served.KEY}"})
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    found = [float(line.split()[1]) for line in lines
             if not line.startswith("#") and line.split()[0].endswith(("_running", "_waiting"))]
    assert len(found) == 2, lines
    return sum(found)


def test_a_full_queue_says_when_to_come_back(client: Client, runs: Path, tmp_path: Path) -> None:
    """Without retries RateLimitError; with retries the client waits for Retry-After, and gets its answer."""
    with served.serving(runs / BASE, tmp_path / "log", "--max-rows", 1, "--max-waiting", 1, "--log-requests") as server:
        client(server, to("completions", GREEDY))  # loads the model
        held = [hold(server) for _ in range(2)]
        [refused] = client(server, to("completions", GREEDY))
        assert (refused["error"], refused["status_code"]) == ("RateLimitError", 429)
        assert refused["code"] == "rate_limit_exceeded" and 1 <= int(refused["retry_after"]) <= 60
        before = refusals(server)

        def release() -> None:
            while refusals(server) == before and server.process.poll() is None:
                time.sleep(0.05)
            for connection in held:
                connection.close()

        threading.Thread(target=release).start()
        [result] = client(server, to("completions", GREEDY), retries=9)
        [value] = values([result])
        assert len(texts(value)[0]) > 3
        assert refusals(server) - before == 1 and result["seconds"] >= 1  # it did not ask again too early


def refusals(server: Server) -> int:
    """Return the number of answers with the status 429."""
    return server.log.read_text().count(": 429 in")


def hold(server: Server) -> Any:
    """Start a stream that takes a place, and return its connection."""
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": ENDLESS, "stream": True}
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    before = running(server)
    connection.request("POST", "/v1/completions", json.dumps(body),
                       {"Authorization": f"Bearer {served.KEY}", "Content-Type": "application/json"})
    deadline = time.monotonic() + 30
    while running(server) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return connection


def test_an_error_in_a_stream_is_raised(client: Client, runs: Path, tmp_path: Path) -> None:
    """After pieces that are as they would be without it. A whole answer that takes too long is no answer."""
    with served.serving(runs / BASE, tmp_path / "log", "--timeout", 2) as server:
        endless = {"max_tokens": ENDLESS}
        client(server, to("completions", GREEDY))
        [streamed] = client(server, to("completions", GREEDY, endless, {"stream": True}))
        [whole] = client(server, to("completions", GREEDY, endless), retries=3)
    assert streamed["error"] == "APIError" and streamed["code"] == "timeout" and "2 seconds" in streamed["message"]
    assert len(streamed["chunks"]) > 10
    assert (whole["error"], whole["status_code"], whole["code"]) == ("InternalServerError", 504, "timeout")
