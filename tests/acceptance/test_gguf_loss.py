"""Loss of GGUF files by llama.cpp's own logits, on 10,000 tokens of the validation split.

BARDLET_NODE_MODULES names a folder node_modules with node-llama-cpp, BARDLET_DATA real text.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bardlet.cli import main
from bardlet.export import export as exporting
from bardlet.export import gguf

NODE, MODULES, DATA = shutil.which("node"), os.environ.get("BARDLET_NODE_MODULES"), os.environ.get("BARDLET_DATA")
CONTEXT, WINDOWS = 128, 80

pytestmark = pytest.mark.skipif(None in (NODE, MODULES, DATA),
                                reason="needs Node.js, BARDLET_NODE_MODULES and BARDLET_DATA")


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "char"), ("qwen3", "bpe"), ("qwen3", "byte")])
def test_q8_0_costs_less_than_a_thousandth(family: str, kind: str, tmp_path: Path) -> None:
    text = Path(str(DATA)) / "tinyshakespeare/input.txt"
    assert main(["train", str(text), "--model", family, "--tokenizer", kind,
                 *(["--vocab-size", "1000"] if kind == "bpe" else []), "--steps", "300", "--n-layer", "4",
                 "--n-head", "4", "--n-embd", "128", "--block-size", str(CONTEXT), "--batch-size", "16", "--dtype",
                 "fp32", "--compile", "off", "--out", str(tmp_path / "run")]) == 0
    source = exporting.read(tmp_path / "run")
    ids = torch.from_numpy(source.tokenizer.encode(text.read_text(encoding="utf-8")[-60_000:]))
    windows = ids[:WINDOWS * CONTEXT].view(WINDOWS, CONTEXT)  # the last tenth is the validation split
    with torch.inference_mode():
        logits = source.model(windows[:, :-1])
        ours = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    for dtype in gguf.DTYPES:
        gguf.write(tmp_path / f"{dtype}.gguf", source.model, source.tokenizer, "m", dtype)
        script = Path(__file__).parent / "engines" / "llama_loss.mjs"
        done = subprocess.run([str(NODE), str(script), str(MODULES), str(tmp_path / f"{dtype}.gguf")], text=True,
                              input=json.dumps({"windows": windows.tolist()}), capture_output=True)
        assert not done.returncode, done.stderr[-3000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        size = (tmp_path / f"{dtype}.gguf").stat().st_size
        print(f"{family} {kind} {dtype}: {answer['loss']:.5f} nats per token, in fp32 {ours:.5f}; {size:,} bytes")
        assert answer["tokens"] >= 10_000
        assert answer["loss"] == pytest.approx(ours, rel={"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-3}[dtype])
