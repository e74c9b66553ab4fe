"""A real small model, SmolLM2-135M-Instruct: BARDLET_SMOLLM2 names its folder, which `benchmarks/smollm2.py` makes."""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import torch
from live_server import Live, Reply, live, read

import bardlet
from bardlet.cli import main
from bardlet.inference.generate import generate
from bardlet.run import hf

FOLDER = Path(os.environ.get("BARDLET_SMOLLM2") or "no-such-folder")
NEAR_TIE = 1e-4
PROMPTS = [
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):", "In the year 1905, Einstein",
    "Water boils at", "The three primary colors are", "To bake a simple bread, you need", "My favorite book is",
    "Photosynthesis is the process by which", "2, 4, 6, 8,", "Dear Sir or Madam,", "The quick brown fox",
    "SELECT name FROM", "Die Hauptstadt von Deutschland ist", "She opened the door and", "The derivative of x^2 is",
    "A haiku about autumn:", "The largest planet in the solar system", "Q: How many legs has a spider?\nA:",
    "import numpy as np\n",
]  # fmt: skip

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="BARDLET_SMOLLM2 is unset; see benchmarks/smollm2.py")


@pytest.fixture(scope="module")
def ours() -> tuple[Any, Any]:
    return hf.read_folder(FOLDER)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on to the end
    return model


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_200_greedy_tokens_are_those_of_transformers(prompt: str, ours: tuple[Any, Any], theirs: Any) -> None:
    """Where they part, ours is one of the two likeliest tokens, which are nearly equal; the rest is another text.

    pytest lists these places among the warnings.
    """
    model, tokenizer = ours
    ids = tokenizer.encode(prompt).tolist()
    [got] = generate(model, [ids], 200, temperature=0)
    idx = torch.tensor([ids])
    out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, do_sample=False,
                          output_logits=True, return_dict_in_generate=True)  # fmt: skip
    want = out.sequences[0, len(ids):].tolist()
    parted = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), None)
    if parted is not None:
        best = out.logits[parted][0].topk(2)
        gap = float(best.values[0] - best.values[1])
        warnings.warn(f"{prompt!r}: near-tie at token {parted}, {gap:.1e} apart", stacklevel=1)
        assert got[parted] in best.indices.tolist()
        assert gap < NEAR_TIE


def test_chat_answers_and_stops() -> None:
    model = bardlet.load(FOLDER)
    answer = model.chat("What is the capital of France?", temperature=0)
    assert "Paris" in answer and "<|im_end|>" not in answer


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
def test_the_server_answers_as_chat_does(dtype: str, tmp_path: Path) -> None:
    want = bardlet.load(FOLDER, dtype=dtype).chat("What is the capital of France?", temperature=0)  # type: ignore[arg-type]
    body = {"model": FOLDER.name, "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0}

    async def ask(server: Live) -> Reply:
        async with server.posted(body, "/v1/chat/completions") as (reader, _):
            return await read(reader)

    with live([FOLDER], tmp_path / "log", "--dtype", dtype) as server:
        reply = asyncio.run(ask(server))
    assert reply.status == 200 and reply.value["choices"][0]["message"]["content"] == want
    assert "Paris" in want and reply.value["choices"][0]["finish_reason"] == "stop"


def test_every_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sampling, tasks, LoRA on conversations and preferences, and a GGUF file whose weights transformers reads back."""
    def run(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"What is {n} plus one?"}, {"role": "assistant", "content": f"{n + 1}, my lord."},
    ]}) + "\n" for n in range(64)), encoding="utf-8")
    pairs.write_text("".join(json.dumps({
        "prompt": f"What is {n} plus one?", "chosen": f"{n + 1}, my lord.", "rejected": f"{n + 1}."}) + "\n"
        for n in range(48)), encoding="utf-8")
    assert len(run("sample", FOLDER, "--prompt", "The capital of France is", "--tokens", "20")) > 40
    result = json.loads(run("eval", FOLDER, "--task", "arc-easy", "--limit", "40", "--json").splitlines()[-1])
    assert result["tasks"]["arc-easy"]["acc"] > 0.35  # chance: 0.25
    run("sft", FOLDER, chats, "--lora", "8", "--steps", "30", "--block-size", "256", "--batch-size", "4",
        "--out", tmp_path / "sft")
    assert "my lord" in bardlet.load(tmp_path / "sft").chat("What is 70 plus one?", temperature=0)
    run("dpo", tmp_path / "sft", pairs, "--lora", "8", "--steps", "4", "--block-size", "256", "--batch-size", "2",
        "--out", tmp_path / "dpo")
    run("export", tmp_path / "dpo", "--to", "gguf", "--dtype", "f32", "--out", tmp_path / "m.gguf")
    back = gguf_models.read_back(tmp_path / "m.gguf").state_dict()
    for name, tensor in hf.read_folder(tmp_path / "dpo")[0].hf_state_dict().items():
        assert torch.equal(back[name], tensor), name
