"""Model folders as others write them, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from bardlet import models
from bardlet import tokenizer as tokenization
from bardlet.config.model import ModelConfig
from bardlet.run import hf
from bardlet.runtime.manifest import MANIFEST

SHAPE = {"vocab_size": 300, "block_size": 32, "n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "head_dim": 8,
         "n_inner": 64}


def write_model(folder: Path, family: str = "gpt2") -> Path:
    """Write a Hugging Face folder with random weights and a BPE tokenizer, without bardlet's manifest."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    activation = "silu" if family == "qwen3" else "gelu_new"
    model = models.build(ModelConfig(family, activation=activation, **SHAPE))
    hf.write_folder(folder, model, tokenization.train_bpe(["the little bards sang naïve songs, é\n"] * 9, 300))
    hf.write_weights(folder, model.hf_state_dict())
    (folder / MANIFEST).unlink()
    return folder
