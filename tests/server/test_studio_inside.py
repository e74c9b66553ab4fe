"""The routes of the tab Inside: readings, neighbors, and the rungs of a ladder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from small_server import BPE, BYTES, LETTERS, app_of, registry, write

from bardlet.api.models import load
from bardlet.server import inside as answers

TEXT = "the little bards"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write(root / "bytes", vocab_size=270, n_layer=2)
    write(root / "pairs", BPE)
    write(root / "letters", LETTERS, n_kv_head=1)
    write(root / "translator", BPE, "encdec", n_encoder_layer=1)
    for rung, seed in (("01-bigram", 1337), ("03-one-head", 1337), ("03-one-head", 1338), ("08-dropout", 1337)):
        write(root / "ladder" / rung / f"seed-{seed}", LETTERS, rung[3:], block_size=8)
    (root / "ladder" / "ladder.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    engine = FakeEngine()
    app = app_of(registry(root, engine))
    app.state.studio = object()
    with TestClient(app) as client:
        yield client
    engine.close()


def post(client: TestClient, path: str, status: int = 200, **fields: Any) -> Any:
    answer = client.post(f"/studio/{path}", json={"model": "bytes", **fields})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def test_a_text_is_looked_at(client: TestClient, root: Path) -> None:
    answer = post(client, "inside", text=TEXT, tokens=9)
    ids = BYTES.encode(TEXT).tolist()
    assert answer["tokens"] == [{"id": i, "name": chr(i), "text": chr(i)} for i in ids]
    assert (answer["model"], answer["cut"], answer["off"]) == ("bytes", 0, [])
    assert [[[len(row) for row in head] for head in layer] for layer in answer["attention"]] == [
        [list(range(1, len(ids) + 1))] * 2] * 2
    for row in (row for layer in answer["attention"] for head in layer for row in head):
        assert sum(row) == pytest.approx(1, abs=1e-3) and all(round(x, 4) == x for x in row)
    model = load(root / "bytes")
    with torch.inference_mode():
        logits_TV = model.module(torch.tensor([ids]))[0]
    expected = F.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:]), reduction="none").tolist()
    assert answer["losses"][0] is None and answer["losses"][1:] == pytest.approx(expected, abs=1e-5)
    mean = sum(expected) / len(expected)
    assert answer["loss"] == pytest.approx({"per_token": mean, "per_character": mean}, abs=1e-5)
    assert [row["after"] for row in answer["lens"]] == ["embedding", "block 1", "block 2"]
    best = answer["lens"][-1]["guesses"]
    assert [guess["id"] for guess in best] == logits_TV.argmax(-1).tolist()
    assert best[-1]["following"] is None and best[0]["following"] == pytest.approx(
        float(logits_TV[0].softmax(-1)[ids[1]]), abs=1e-5)
    assert answer["continuation"] == model.generate(TEXT, 9, temperature=0)


def test_losses_count_characters(client: TestClient) -> None:
    """A token of several characters, and a character of several tokens."""
    answer = post(client, "inside", model="pairs", text="the little naïve bards €", tokens=0)
    text = "".join(token["text"] for token in answer["tokens"][1:])
    total = sum(answer["losses"][1:])
    assert answer["continuation"] == "" and len(text) > len(answer["tokens"])
    assert answer["loss"]["per_character"] == pytest.approx(total / len(text), abs=1e-5)
    assert {"", "€"} <= {token["text"] for token in answer["tokens"]}


def test_a_single_token_has_no_loss(client: TestClient) -> None:
    answer = post(client, "inside", text="", tokens=1)
    assert answer["loss"] == {"per_token": None, "per_character": None} and answer["losses"] == [None]
    assert answer["tokens"] == [{"id": BYTES.eos_id, "name": "<|endoftext|>", "text": ""}]
    assert answer["attention"][0][0] == [[1.0]]


def test_a_long_text_loses_its_beginning(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = post(client, "inside", text="x" * 8 + TEXT * 2, tokens=0)
    assert answer["cut"] == 8 and "".join(token["text"] for token in answer["tokens"]) == TEXT * 2
    monkeypatch.setattr(answers, "MOST_WEIGHTS", 200)
    answer = post(client, "inside", text=TEXT, tokens=0)
    assert answer["cut"] == 6 and "".join(token["text"] for token in answer["tokens"]) == TEXT[6:]


def test_heads_are_switched_off(client: TestClient) -> None:
    before, after = (post(client, "inside", text=TEXT, off=off) for off in ([], [[1, 0], [1, 0], [0, 1]]))
    assert after["off"] == [[0, 1], [1, 0]] and after["attention"][0] == before["attention"][0]
    assert after["losses"] != before["losses"] and after["attention"][1] != before["attention"][1]
    assert post(client, "inside", text=TEXT) == before


@pytest.mark.parametrize(("path", "fields", "param"), [
    ("inside", {"text": "a", "off": [[2, 0]]}, "off"), ("inside", {"text": "a", "off": [[0, 2]]}, "off"),
    ("inside", {"text": "a", "off": [[0]]}, "off[0]"), ("inside", {"text": "a", "off": [[-1, 0]]}, "off[0][0]"),
    ("inside", {"text": "a", "tokens": 201}, "tokens"), ("inside", {"text": "a", "tokens": True}, "tokens"),
    ("inside", {"text": "#", "model": "letters"}, "text"), ("inside", {"text": "a", "more": 1}, "more"),
    ("inside", {"text": "a", "model": "translator"}, "model"), ("inside", {}, "text"),
    ("inside", {"text": "a", "model": "01-bigram/seed-1337"}, "model"), ("inside", {"text": "x" * 20_001}, "text"),
    ("neighbors", {"token": 270}, "token"), ("neighbors", {"token": 269}, "token"),
    ("neighbors", {"token": -1}, "token"),
    ("neighbors", {"token": 1, "model": "translator"}, "model"), ("rungs", {"text": 1}, "text"),
    ("rungs", {"text": "#", "model": "08-dropout/seed-1337"}, "text")], ids=str)
def test_requests_are_refused(client: TestClient, path: str, fields: dict[str, Any], param: str) -> None:
    assert post(client, path, 400, **fields)["param"] == param


def test_neighbors_of_a_token(client: TestClient, root: Path) -> None:
    answer = post(client, "neighbors", token=97)
    weight_VC = load(root / "bytes").module.model.embed_tokens.weight[: BYTES.vocab_size].detach()
    similarity_V = F.cosine_similarity(weight_VC, weight_VC[97][None])
    order = similarity_V.argsort(descending=True).tolist()[1:13]
    assert answer["token"] == {"id": 97, "name": "a"}
    assert [each["id"] for each in answer["neighbors"]] == order
    assert answer["neighbors"][0]["similarity"] == pytest.approx(float(similarity_V[order[0]]), abs=1e-4)


def test_the_rungs_of_a_ladder_read_a_text(client: TestClient, root: Path) -> None:
    """Those of the same seed; a text may be longer than their context."""
    answer = post(client, "rungs", model="08-dropout/seed-1337", text=TEXT, tokens=5)
    assert [(rung["number"], rung["name"], rung["context"]) for rung in answer["rungs"]] == [
        (1, "bigram", 8), (3, "one-head", 8), (8, "dropout", 8)]
    for rung in answer["rungs"]:
        model = load(root / "ladder" / f"{rung['number']:02}-{rung['name']}" / "seed-1337")
        assert rung["continuation"] == model.generate(TEXT, 5, temperature=0) and rung["loss"] > 1
    assert post(client, "rungs", text=TEXT)["rungs"] == []


def test_a_rung_is_looked_at(client: TestClient) -> None:
    answer = post(client, "inside", model="03-one-head/seed-1337", text=TEXT)
    assert answer["cut"] == 8 and len(answer["attention"]) == len(answer["attention"][0]) == 1


def test_a_server_of_models_alone_has_no_tab(client: TestClient) -> None:
    client.app.state.studio = None
    try:
        for path, fields in (("inside", {"text": "a"}), ("neighbors", {"token": 1}), ("rungs", {"text": "a"})):
            assert post(client, path, 404, **fields)["code"] == "no_studio"
    finally:
        client.app.state.studio = object()
