"""Models, embeddings, tokens and translations."""

from __future__ import annotations

import base64
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from small_server import BPE, BYTES

from bardlet.api.models import load
from bardlet.server import responses

pytest_plugins = ("api_fixtures",)


def post(client: TestClient, path: str, status: int = 200, **fields: Any) -> Any:
    answer = client.post(path, json={"model": "bytes", **fields})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


# ---------------------------------------------------------------------------- models


def test_models_are_listed(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    responses.ModelList.model_validate(models)
    assert [model["id"] for model in models["data"]] == ["bpe", "bytes", "chat", "letters", "translator"]
    assert models["data"][0]["max_model_len"] == 32 and models["data"][0]["created"] > 1e9
    assert [model["id"] for model in models["data"] if model["has_chat_template"]] == ["chat"]
    assert [model["id"] for model in models["data"] if model["translates"]] == ["translator"]
    assert client.get("/v1/models/bpe").json() == models["data"][0]


def test_an_unknown_model_is_404(client: TestClient) -> None:
    """With the names that there are, and no path of this machine."""
    for answer in (client.get("/v1/models/no/such"), client.post("/tokenize", json={"model": "no/such", "text": ""})):
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
        assert "bpe, bytes, chat" in error["message"]


# ---------------------------------------------------------------------------- embeddings


def test_embeddings_are_means_of_hidden_states(client: TestClient, root: Path) -> None:
    answer = post(client, "/v1/embeddings", input=["ab", "c", "ab"])
    responses.Embeddings.model_validate(answer)
    first, second, third = (item["embedding"] for item in answer["data"])
    assert first == third != second and len(first) == 16
    assert math.isclose(sum(x * x for x in first), 1, rel_tol=1e-5)
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    import torch

    module = load(root / "bytes").module
    with torch.inference_mode():
        mean = module.hidden(torch.tensor([[97, 98]]))[0].mean(0)
    assert first == pytest.approx((mean / mean.norm()).tolist(), abs=1e-6)


def test_embeddings_come_in_base64(client: TestClient) -> None:
    """Which the openai package asks for."""
    plain = post(client, "/v1/embeddings", input=[97, 98])["data"][0]["embedding"]
    packed = post(client, "/v1/embeddings", input=[[97, 98]], encoding_format="base64")["data"][0]["embedding"]
    assert list(struct.unpack("<16f", base64.b64decode(packed))) == plain


@pytest.mark.parametrize(("fields", "param"), [
    ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": [""]}, "input"), ({"input": "x" * 33}, "input"),
    ({"input": [999]}, "input"), ({"input": "a", "dimensions": 8}, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"), ({"input": "a", "model": "translator"}, "model"),
    ({"input": "#", "model": "letters"}, "input"), ({"input": "a", "truncate": True}, "truncate")], ids=str)
def test_embeddings_are_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert post(client, "/v1/embeddings", 400, **fields)["param"] == param


def test_the_size_of_the_vectors_may_be_said(client: TestClient) -> None:
    assert post(client, "/v1/embeddings", input="a", dimensions=16, encoding_format="float", user="u")["data"]


# ---------------------------------------------------------------------------- tokens


def test_text_becomes_tokens_and_text_again(client: TestClient) -> None:
    text = "the naïve bards €"
    answer = post(client, "/tokenize", model="bpe", text=text)
    responses.Tokens.model_validate(answer)
    assert answer["tokens"] == BPE.encode(text).tolist() and answer["count"] == len(answer["tokens"])
    assert answer["pieces"][0] == "the"
    assert post(client, "/detokenize", model="bpe", tokens=answer["tokens"]) == {"model": "bpe", "text": text}


def test_tokens_may_begin_a_document(client: TestClient) -> None:
    assert post(client, "/tokenize", text="", add_start=True)["tokens"] == [BYTES.eos_id]
    assert post(client, "/tokenize", text="a", add_start=True)["pieces"] == ["a"]
    assert post(client, "/tokenize", text="")["tokens"] == []
    assert post(client, "/detokenize", tokens=[BYTES.eos_id, 265])["text"] == "<|endoftext|>"


def test_tokens_are_refused(client: TestClient) -> None:
    assert "'#'" in post(client, "/tokenize", 400, model="letters", text="#")["message"].replace('"', "'")
    assert post(client, "/detokenize", 400, tokens=[270])["param"] == "tokens"
    assert post(client, "/detokenize", 400, tokens=["a"])["param"] == "tokens[0]"
    assert post(client, "/tokenize", 400, text=[])["param"] == "text"


# ---------------------------------------------------------------------------- translations


def test_lines_are_translated(client: TestClient, root: Path) -> None:
    lines = ["the little", "", "bards sang", "songs", "the naïve songs"]
    answer = post(client, "/translate", model="translator", text=lines, beam=2)
    responses.Translations.model_validate(answer)
    model = load(root / "translator")
    assert answer["translations"] == model.translate(lines[:4], beam=2) + model.translate(lines[4:], beam=2)
    assert post(client, "/translate", model="translator", text="")["translations"] == [""]


@pytest.mark.parametrize(("fields", "param"), [
    ({}, "model"), ({"model": "translator", "text": []}, "text"), ({"model": "translator", "beam": 0}, "beam"),
    ({"model": "translator", "text": ["a", "x " * 60]}, "text"),
    ({"model": "translator", "length_penalty": -1}, "length_penalty")], ids=str)
def test_translations_are_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert post(client, "/translate", 400, **{"text": "a", **fields})["param"] == param
