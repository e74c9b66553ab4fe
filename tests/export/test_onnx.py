"""An ONNX graph computes what the model computes: with and without a cache, in padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from export.test_page import RELATIVES, TEXT, greedy, model_of

from bardlet import tokenizer as tk
from bardlet.errors import BardletError
from bardlet.export import onnx
from bardlet.runtime import manifest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
MODELS = {"gpt2": ("gpt2", {}), "untied": ("gpt2", {"tie_embeddings": False, "activation": "gelu"}),
          "qwen3": ("qwen3", {"activation": "silu"}),
          "grouped": ("qwen3", {"activation": "silu", "n_kv_head": 1, "n_head": 4, "head_dim": 6}), **RELATIVES}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model, and a session of its graph."""
    family, changes = MODELS[request.param]
    model = model_of(family, 30, **changes)
    onnx.write(tmp_path / "model.onnx", model)
    return model, ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


def call(session: Any, model: Any, ids: list[list[int]], mask: list[list[int]],
         cache: dict[str, np.ndarray] | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (logits, cache) of some ids after a cache."""
    config, seen = model.config, np.array(mask, np.int64)
    empty = np.zeros((len(ids), config.n_kv_head, 0, config.head_dim), np.float32)
    names = [f"{n}.{kind}" for n in range(config.n_layer) for kind in ("key", "value")]
    past = cache or dict.fromkeys(names, empty)
    position = np.maximum(seen.cumsum(1) - 1, 0)[:, -len(ids[0]):]
    outputs = session.run(None, {"input_ids": np.array(ids, np.int64), "attention_mask": seen,
                                 "position_ids": position, **{f"past_key_values.{name}": past[name] for name in names}})
    return outputs[0], dict(zip(names, outputs[1:], strict=True))


def test_logits_are_the_models(pair: tuple[Any, Any]) -> None:
    model, session = pair
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(ids)
    logits, cache = call(session, model, ids.tolist(), [[1] * 9] * 2)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-4)
    first, cache = call(session, model, ids[:, :5].tolist(), [[1] * 5] * 2)
    then, _ = call(session, model, ids[:, 5:].tolist(), [[1] * 9] * 2, cache)
    torch.testing.assert_close(torch.from_numpy(np.concatenate((first, then), 1)), wanted, rtol=1e-4, atol=1e-4)


def test_a_padded_row_continues_as_it_would_alone(pair: tuple[Any, Any]) -> None:
    model, session = pair
    prompts = [[3, 4, 5, 6, 7], [8, 9]]
    padded, mask = [[3, 4, 5, 6, 7], [0, 0, 0, 8, 9]], [[1] * 5, [0, 0, 0, 1, 1]]
    logits, cache = call(session, model, padded, mask)
    rows: list[list[int]] = [[], []]
    for _ in range(8):
        chosen = logits[:, -1].argmax(-1)
        for row, token in zip(rows, chosen, strict=True):
            row.append(int(token))
        mask = [[*row, 1] for row in mask]
        logits, cache = call(session, model, [[int(token)] for token in chosen], mask, cache)
    assert rows == greedy(model, prompts, 8)


def test_what_has_no_graph_is_one_sentence() -> None:
    for family, changes, message in (("bigram", {}, "not for bigram"), ("gpt2", {"scores": True}, "not for a reward")):
        with pytest.raises(BardletError, match=message):
            onnx.check(model_of(family, 30, **changes))


def test_a_tokenizer_of_characters_replaces_unknown_ones_in_transformers_js_too(tmp_path: Path) -> None:
    tokenizer = tk.train_char(TEXT + "😀<|>", True).with_tokens(["<|end|>"], "é")
    tokenizer.save(tmp_path)
    before = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    onnx.write_tokenizer(tmp_path, tokenizer)
    after = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "BPE"
    known = TEXT[:50] + "😀é\n<|>"
    assert after.encode(known).ids == tokenizer.encode(known).tolist()
    for text in (known, "日 😀日日", "<|endoftext|>a<|end|>", ""):
        assert after.encode(text).ids == before.encode(text).ids
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)
    assert after.get_vocab() == before.get_vocab()
    assert set(manifest.read_manifest(tmp_path)["files"]) == {"tokenizer.json"}


def test_other_tokenizers_stay(tmp_path: Path) -> None:
    onnx.write_tokenizer(tmp_path, tk.train_byte(True))
    assert not list(tmp_path.iterdir())
