"""Model folders, the app and the fake engine, for tests of the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fake_engine import FakeEngine
from fastapi import FastAPI

from bardlet import models
from bardlet import tokenizer as tokenization
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.run import hf
from bardlet.server.errors import Refusal
from bardlet.server.models import Models
from bardlet.server.routes import ROUTERS
from bardlet.server.settings import ServerSettings

SHAPE = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 16, "head_dim": 8, "n_inner": 24}
SETTINGS = ServerSettings(folders=(), api_key="key", memory_gb=4.0, timeout=20.0)
LETTERS = tokenization.train_char("\n abcdefghijklmnopqrstuvwxyz.,!é", separator=True)
BYTES = tokenization.train_byte(separator=True)
BPE = tokenization.train_bpe(["the little bards sang naïve songs, é\n"] * 9, 300)


def write(folder: Path, tokenizer: Any = BYTES, family: str = "qwen3", **changes: Any) -> Path:
    """Write a model with random weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    size = max(tokenizer.vocab_size, changes.pop("vocab_size", 0))
    config = ModelConfig(family, activation="silu", vocab_size=size, **{**SHAPE, **changes})
    model = models.build(config)
    hf.write_folder(folder, model, tokenizer)
    hf.write_weights(folder, model.hf_state_dict())
    return folder


def chat_tokenizer() -> Any:
    """Return a byte tokenizer with bardlet's chat template."""
    tokenizer = chat_template.with_special_tokens(BYTES)
    tokenizer.chat_template = chat_template.TEMPLATE
    return tokenizer


def app_of(registry: Models) -> FastAPI:
    """Return an app with the API alone."""
    app = FastAPI()
    app.state.models = registry
    app.add_exception_handler(Refusal, lambda request, error: error.response())
    for router in ROUTERS:
        app.include_router(router)
    return app


def registry(root: Path, engine: FakeEngine, **changes: Any) -> Models:
    """Return a registry of the folders below `root`."""
    return Models((str(root),), replace(SETTINGS, **changes), engine)


def events(body: str) -> Iterator[Any]:
    """Yield the objects of a stream, and "[DONE]"; assert that it has the form of server-sent events."""
    assert body.endswith("\n\n")
    for block in body.removesuffix("\n\n").split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block and block.isascii()
        data = block.removeprefix("data: ")
        yield data if data == "[DONE]" else json.loads(data)
