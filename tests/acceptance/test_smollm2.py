"""A real small model, SmolLM2-135M-Instruct: BARDLET_SMOLLM2 names its folder, which `benchmarks/smollm2.py` makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bardlet
from bardlet.data import named
from bardlet.inference import readers
from bardlet.inference.generate import generate
from bardlet.run import hf

FOLDER = Path(os.environ.get("BARDLET_SMOLLM2", "no-such-folder"))
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
    """Where they part, the two likeliest tokens must be nearly equal; then the rest is another text."""
    model, tokenizer = ours
    ids = tokenizer.encode(prompt).tolist()
    [got] = generate(model, [ids], 200, temperature=0)
    idx = torch.tensor([ids])
    out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, do_sample=False,
                          output_logits=True, return_dict_in_generate=True)  # fmt: skip
    want = out.sequences[0, len(ids):].tolist()
    parted = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), None)
    if parted is not None:
        best = out.logits[parted][0].topk(2).values
        print(f"{prompt!r}: near-tie at token {parted}: {float(best[0] - best[1]):.1e}")
        assert float(best[0] - best[1]) < NEAR_TIE


@torch.inference_mode()
def test_int8_has_nearly_the_loss_of_fp32(ours: tuple[Any, Any]) -> None:
    """Within 0.1 % over 10,000 tokens of a real text."""
    model, tokenizer = ours
    ids = tokenizer.encode((named.get("tinyshakespeare") / "input.txt").read_text(encoding="utf-8"))[:10_000].tolist()
    loss = {dtype: text_loss(model, ids, dtype) for dtype in (None, torch.int8)}
    print(loss)
    assert abs(loss[torch.int8] / loss[None] - 1) < 0.001


def text_loss(model: Any, ids: list[int], dtype: torch.dtype | None, window: int = 500) -> float:
    """Return the mean loss of the tokens in windows, by the decoder."""
    decoder, total, count = readers.new_decoder(model, dtype), 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        reader = readers.reader(model, decoder, readers.pages_for(len(part), model.config.block_size))
        context = reader.open(part[:-1], scores=True)
        while context.unread:
            reader.step(256)
        losses = F.cross_entropy(torch.cat(context.logits).float(), torch.tensor(part[1:]), reduction="sum")
        total, count = total + float(losses), count + len(part) - 1
    return total / count


def test_chat_answers_and_stops() -> None:
    model = bardlet.load(FOLDER)
    answer = model.chat("What is the capital of France?", temperature=0)
    assert "Paris" in answer and "<|im_end|>" not in answer
