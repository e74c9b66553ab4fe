"""Weights in several files and dtypes, read one tensor after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bardlet
from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.models import build
from bardlet.run import hf
from bardlet.run.stored import StoredTensors
from bardlet.tokenizer import train_byte

CONFIG = ModelConfig("llama", vocab_size=257, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8,
                     n_inner=48, activation="silu", norm_eps=1e-6)  # fmt: skip
GPT2 = replace(CONFIG, model="gpt2", n_kv_head=4, activation="gelu_new", norm_eps=1e-5)


def write(folder: Path, model: Any, dtype: torch.dtype, shards: int = 1) -> Path:
    """Write a folder as Hugging Face does, its weights in `shards` files."""
    folder.mkdir()
    tokenizer = train_byte(True)
    hf.write_folder(folder, model, tokenizer)
    (folder / "manifest.json").unlink()
    tensors = [(name, tensor.to(dtype)) for name, tensor in model.hf_state_dict().items()]
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = [f"model-{n}.safetensors" for n in range(shards)]
    for n, name in enumerate(names):
        save_file(dict(tensors[n::shards]), folder / name)
    weight_map = {tensor: names[i % shards] for i, (tensor, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("config", [CONFIG, GPT2, replace(CONFIG, tie_embeddings=False)])
@pytest.mark.parametrize("shards", [1, 3])
def test_bf16_stays_bf16_if_it_may(config: ModelConfig, shards: int, tmp_path: Path) -> None:
    model = build(config).eval()
    folder = write(tmp_path / "m", model, torch.bfloat16, shards)
    kept, wide = hf.read_folder(folder, dtype=None)[0], hf.read_folder(folder)[0]
    for own, half, whole in zip(model.parameters(), kept.parameters(), wide.parameters(), strict=True):
        assert half.dtype == torch.bfloat16 and whole.dtype == torch.float32
        assert torch.equal(half, own.bfloat16()) and torch.equal(whole, own.bfloat16().float())
        assert half.is_contiguous() and half.requires_grad and isinstance(half, torch.nn.Parameter)
    idx = torch.randint(257, (1, 20))
    assert torch.isfinite(wide(idx)).all() and torch.isfinite(kept(idx)).all()


def test_fp32_and_a_mixture_are_fp32(tmp_path: Path) -> None:
    model = build(CONFIG)
    for dtype in (torch.float32, torch.float16):
        folder = write(tmp_path / str(dtype), model, dtype)
        assert {p.dtype for p in hf.read_folder(folder, dtype=None)[0].parameters()} == {torch.float32}
    save_file({"a": torch.ones(2).bfloat16(), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    assert StoredTensors([tmp_path / "x.safetensors"], None).dtype == torch.float32


def test_the_api_says_which_precision_it_took(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", build(CONFIG), torch.bfloat16)
    assert bardlet.load(folder).dtype == "bf16"
    assert bardlet.load(folder, dtype="fp32").dtype == "fp32"
    assert bardlet.load(folder, dtype="fp32").generate("a", 5, seed=0) != ""


def test_a_tensor_that_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    stored = StoredTensors([path])
    a = stored["a"]
    with open(path, "r+b") as file:
        file.seek(-32, 2)
        file.write(b"\xff" * 32)
    assert torch.equal(a, torch.ones(4))
    path.write_bytes(b"short")
    with pytest.raises(BardletError, match="damaged"):
        StoredTensors([path])
