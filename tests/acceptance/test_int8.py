"""int8 weights lose next to nothing: on trained models, over 10,000 tokens that they were not trained on.

BARDLET_SMOLLM2 names the folder of SmolLM2, which `benchmarks/smollm2.py` makes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bardlet.cli import main
from bardlet.data import named
from bardlet.inference import readers
from bardlet.run import hf

SMOLLM2 = Path(os.environ.get("BARDLET_SMOLLM2") or "no-such-folder")
SIZES = {  # layers, heads, channels, window, rows of a step, steps
    "1.8 M": (6, 4, 160, 128, 24, 600),
    "10.65 M": (6, 6, 384, 256, 12, 400),
}


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("size", SIZES)
def test_of_models_trained_on_shakespeare(size: str, family: str, tmp_path: Path) -> None:
    layers, heads, channels, window, rows, steps = map(str, SIZES[size])
    assert main(["train", "tinyshakespeare", "--model", family, "--tokenizer", "char", "--n-layer", layers,
                 "--n-head", heads, "--n-embd", channels, "--block-size", window, "--batch-size", rows, "--steps",
                 steps, "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    check(tmp_path / "run", slice(-10_000, None))  # of the last tenth, which is held out


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="BARDLET_SMOLLM2 is unset; see benchmarks/smollm2.py")
def test_of_smollm2() -> None:
    check(SMOLLM2, slice(10_000))


def check(folder: Path, part: slice) -> None:
    """Compare the losses of a part of the tokens of Tiny Shakespeare: they differ by at most 0.1 %."""
    model, tokenizer = hf.read_folder(folder)
    text = (named.get("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)[part].tolist()
    losses = {str(dtype): text_loss(model, ids, dtype) for dtype in (None, torch.int8)}
    print(losses)
    assert losses["torch.int8"] == pytest.approx(losses["None"], rel=0.001)
    assert losses["torch.int8"] != losses["None"]


@torch.inference_mode()
def text_loss(model: Any, ids: list[int], dtype: torch.dtype | None) -> float:
    """Return the mean loss of the tokens in windows, by the decoder."""
    decoder, window, total, count = readers.new_decoder(model, dtype), min(500, model.config.block_size), 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        reader = readers.reader(model, decoder, readers.pages_for(len(part), model.config.block_size))
        context = reader.open(part[:-1], scores=True)
        while context.unread:
            reader.step(256)
        losses = F.cross_entropy(torch.cat(context.logits).float(), torch.tensor(part[1:]), reduction="sum")
        total, count = total + float(losses), count + len(part) - 1
    return total / count
