"""A folder of bardlet in the tools of Hugging Face: what each computes is what bardlet computes.

Variables name folders of `pip install --target` with what the test environment lacks; `make engines` prepares them:

    BARDLET_TRANSFORMERS_4  transformers 4.57, and what it needs; the others are for version 5 too
    BARDLET_PEFT            peft, and accelerate, which transformers.Trainer needs too
    BARDLET_SERVE           the packages of transformers[serving]
    BARDLET_LM_EVAL         lm_eval, and what it needs
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import cases
from engines.cases import Case
from engines.programs import run

from bardlet.cli import main
from bardlet.evaluation import likelihood
from bardlet.export import export as exporting

PROGRAM = Path(__file__).parent / "engines" / "run_hugging_face.py"
PEFT, SERVE, LM_EVAL, TRANSFORMERS_4 = (os.environ.get(f"BARDLET_{name}")
                                        for name in ("PEFT", "SERVE", "LM_EVAL", "TRANSFORMERS_4"))
BASES = ("gpt2-char-english", "gpt2-bpe-chinese", "qwen3-byte-chinese", "qwen3-bpe-english")
MODELS = [*(name + stage for name in BASES for stage in ("", "-sft")), "gpt2-byte-russian", "qwen3-bpe-english-lora"]
"""LoRA is merged in a folder."""
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.KEPT or tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, parent: Path) -> Case:
    return cases.build(request.param, parent)


@pytest.fixture
def base(case: Case) -> Case:
    if case.chats:
        pytest.skip("for base models")
    return case


@pytest.fixture
def chat(case: Case) -> Case:
    if not case.chats:
        pytest.skip("for chat models")
    return case


@pytest.fixture(params=["transformers 5", "transformers 4"])
def site(request: pytest.FixtureRequest) -> str | None:
    """A folder with the version of transformers, or None for this environment's."""
    if request.param == "transformers 5":
        return None
    if TRANSFORMERS_4 is None:
        pytest.skip("needs BARDLET_TRANSFORMERS_4")
    return TRANSFORMERS_4


def use(tool: str, case: Case, *sites: str | None, **request: Any) -> dict[str, Any]:
    """Let a tool answer a request about the folder of a case. sites: go before this environment's packages."""
    path = os.pathsep.join(filter(None, sites))
    answer = run(sys.executable, PROGRAM, tool, case.folder, request=request, **({"PYTHONPATH": path} if path else {}))
    assert answer["transformers"].startswith("4.57." if TRANSFORMERS_4 in sites and TRANSFORMERS_4 else "5.")
    return answer


def written(case: Case, rows: list[list[int]]) -> list[str]:
    """Return completions as text, without special tokens."""
    return [case.tokenizer.decode(row, skip_special=True) for row in rows]


# ---------------------------------------------------------------------------- pipeline


def test_pipeline(case: Case, site: str | None) -> None:
    """`transformers.pipeline("text-generation")` writes in batches what bardlet writes one at a time."""
    inputs = case.chats or [case.tokenizer.decode(prompt) for prompt in case.prompts]
    # a prompt cut between the bytes of a character is another text
    same = [bool(case.chats) or case.tokenizer.encode(text).tolist() == prompt
            for text, prompt in zip(inputs, case.prompts, strict=True)]
    assert sum(same) >= 20
    answer = use("pipeline", case, site, inputs=[each for each, kept in zip(inputs, same, strict=True) if kept],
                 tokens=cases.TOKENS)
    ours = [text for text, kept in zip(written(case, case.completions), same, strict=True) if kept]
    assert answer["completions"] == ours


# ---------------------------------------------------------------------------- training


@pytest.mark.skipif(PEFT is None, reason="needs BARDLET_PEFT")
@pytest.mark.parametrize("tool", ["trainer", "peft"])
def test_trained_further(case: Case, tool: str, site: str | None, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """bardlet reads what `transformers.Trainer` has trained: all weights, or a LoRA adapter of peft that is merged."""
    out = tmp_path / "out"
    answer = use(tool, case, site, PEFT, texts=case.texts[:60], ids=case.ids[:10], out=str(out), steps=12,
                 lr=3e-3 if tool == "trainer" else 1e-2)
    before, after = answer["losses"]
    assert answer["steps"] == 12 and after < before - 0.02
    source = exporting.read(out)
    assert source.tokenizer.chat_template == case.tokenizer.chat_template
    assert [source.tokenizer.encode(text).tolist() for text in case.texts] == case.ids
    for ids, theirs in zip(case.ids, answer["logits"], strict=False):
        with torch.inference_mode():
            ours, before = (model(torch.tensor([ids]))[0] for model in (source.model, case.model))
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, before, atol=1e-2)
    assert main(["sample", str(out), "--tokens", "20"]) == 0
    assert capsys.readouterr().out


# ---------------------------------------------------------------------------- server


@pytest.mark.skipif(SERVE is None, reason="needs BARDLET_SERVE")
def test_serve(chat: Case, tmp_path: Path) -> None:
    """`transformers serve` answers conversations, whole and streamed, as bardlet does."""
    ours = written(chat, chat.completions)[:5]
    with serving(str(chat.folder), tmp_path / "log") as url:
        for messages, text in zip(chat.chats, ours, strict=False):
            body = {"model": str(chat.folder), "messages": messages, "temperature": 0, "max_tokens": cases.TOKENS}
            reply = json.loads(post(f"{url}/v1/chat/completions", body))
            assert reply["choices"][0]["message"]["content"] == text
            lines = post(f"{url}/v1/chat/completions", {**body, "stream": True}).decode().splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
            assert "".join(deltas) == text


@contextmanager
def serving(model: str, log: Path) -> Iterator[str]:
    """Run `transformers serve` with a model, without the network; yield its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model, "--host",
               "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output,
                                  env={**os.environ, "PYTHONPATH": str(SERVE), "HF_HUB_OFFLINE": "1"})
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.kill()
        server.wait()


def post(url: str, body: dict[str, Any]) -> bytes:
    """Post JSON, and return the answer; an error has the server's own words."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error}: {error.read().decode()[-2000:]}") from None


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.skipif(LM_EVAL is None, reason="needs BARDLET_LM_EVAL")
def test_lm_eval(base: Case) -> None:
    """The harness's own model of a folder, `hf`, scores and writes as bardlet does."""
    tokenizer, device = base.tokenizer, torch.device("cpu")
    halves = [(text[:len(text) // 2], text[len(text) // 2:]) for text in base.texts]
    halves = [pair for pair in halves if all(map(str.strip, pair))][:40]  # it refuses a blank context
    whole = [*base.texts[:20], "".join(base.texts[:60])]  # the last is longer than the context
    # it truncates a text that leaves no room for the answer
    contexts = [text for text, ids in zip(base.texts, base.ids, strict=True)
                if len(ids) <= cases.CONTEXT - cases.TOKENS][:20]
    answer = use("lm_eval", base, LM_EVAL, pairs=halves, texts=whole, contexts=contexts, tokens=cases.TOKENS)

    pairs = [likelihood.encode_pair(tokenizer, *pair) for pair in halves]
    scores = likelihood.log_likelihoods(base.model, pairs, device)
    assert [greedy for _, greedy in answer["pairs"]] == [greedy for _, greedy in scores]
    assert [log_p for log_p, _ in answer["pairs"]] == pytest.approx([log_p for log_p, _ in scores], rel=1e-4)

    start, window = tokenizer.eos_id, base.model.config.block_size
    assert start is not None and len(tokenizer.encode(whole[-1])) > 2 * window
    sums = [sum(log_p for log_p, _ in likelihood.log_likelihoods(base.model, windows(ids, start, window), device))
            for ids in (tokenizer.encode(text).tolist() for text in whole)]
    assert answer["rolling"] == pytest.approx(sums, rel=1e-4)

    prompts = [tokenizer.encode(text).tolist() for text in contexts]
    ours = likelihood.generate_answers(base.model, tokenizer, prompts, cases.TOKENS, stop_ids=base.stops)
    assert answer["completions"] == [text.split("\n")[0] for text in ours]


def windows(ids: list[int], start: int, window: int) -> list[tuple[list[int], list[int]]]:
    """Return the windows of the harness: each token scored once, the last window with all the context that fits."""
    pairs = [([start], ids[:window])]
    for first in range(window, len(ids), window):
        end = min(first + window, len(ids))
        pairs.append((ids[end - window - 1:first], ids[first:end]))
    return pairs
