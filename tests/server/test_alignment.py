"""The cross-attention that the studio shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from small_server import BPE, SHAPE, app_of, registry, write

from bardlet.api.models import load
from bardlet.inference import translate

pytest_plugins = ("api_fixtures",)

LINE, TRANSLATION = "the little bards", "little songs"


def align(client: TestClient, status: int = 200, **fields: Any) -> Any:
    body = {"model": "translator", "source": LINE, "target": TRANSLATION, **fields}
    answer = client.post("/studio/alignment", json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def test_the_weights_of_a_translation(client: TestClient, root: Path) -> None:
    answer = align(client)
    source, target = (BPE.encode(text).tolist() for text in (LINE, TRANSLATION))
    assert "".join(answer["source"][:-1]) == LINE and "".join(answer["target"][:-1]) == TRANSLATION
    assert (len(answer["source"]), len(answer["target"])) == (len(source) + 1, len(target) + 1)
    weights = np.array(answer["attention"])
    assert weights.shape == (SHAPE["n_layer"], len(target) + 1, len(source) + 1)
    assert np.abs(weights.sum(-1) - 1).max() <= 5e-5 * len(answer["source"])
    assert (np.array(answer["mean"]) == weights.mean(0)).all()  # one layer
    module, stop, start = load(root / "translator").module, BPE.eos_id, BPE.pad_id
    assert stop is not None and start is not None
    maps = translate.attention_between(module, [*source, stop], [*target, stop], start)
    assert np.abs(maps.mean(1).numpy() - weights).max() <= 5.1e-5


def test_the_mean_of_two_layers(tmp_path: Path) -> None:
    write(tmp_path / "translator", BPE, "encdec", n_encoder_layer=1, n_layer=2)
    engine = FakeEngine()
    with TestClient(app_of(registry(tmp_path, engine))) as client:
        answer = align(client)
    engine.close()
    layers, mean = np.array(answer["attention"]), np.array(answer["mean"])
    assert layers.shape[0] == 2 and np.abs(layers.mean(0) - mean).max() < 1.1e-4
    assert np.abs(mean.sum(-1) - 1).max() <= 5e-5 * mean.shape[1]


def test_a_token_of_half_a_character_has_a_text(client: TestClient) -> None:
    assert "\ufffd" in "".join(align(client, source="naïve é")["source"])


def test_empty_lines_end_at_once(client: TestClient) -> None:
    assert align(client, source=" ", target="")["attention"] == [[[1.0]]]


@pytest.mark.parametrize(("fields", "param", "code"), [
    ({"model": "bpe"}, "model", "model_not_supported"), ({"model": "bytes"}, "model", "model_not_supported"),
    ({"source": "x " * 60}, "source", "context_length_exceeded"),
    ({"target": "x " * 60}, "target", "context_length_exceeded"),
    ({"source": 5}, "source", "invalid_value"), ({"source": ["a"]}, "source", "invalid_value"),
    ({"target": None}, "target", "invalid_value"), ({"source": "x" * 10_001}, "source", "invalid_value"),
    ({"layer": 1}, "layer", "unknown_parameter")], ids=str)
def test_refusals(client: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    error = align(client, 400, **fields)
    assert (error["param"], error["code"]) == (param, code) and "\n" not in error["message"]


def test_an_unknown_model(client: TestClient) -> None:
    assert align(client, 404, model="no-such-model")["code"] == "model_not_found"


def test_a_decoder_only_translator_has_no_cross_attention(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bardlet.server.alignment.check_translates", lambda loaded: None)  # as if trained on pairs
    error = align(client, 400, model="bpe")
    assert error["code"] == "model_not_supported"
    assert error["message"].startswith("bpe: a decoder-only translator, which has no cross-attention to show;")


def test_lines_with_too_many_weights(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bardlet.server.alignment.MOST", 10)
    assert "at most 10 are shown" in align(client, 400)["message"]
