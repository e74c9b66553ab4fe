"""Requests are strict: types, limits and unknown fields, as /openapi.json describes them."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

pytest_plugins = ("api_fixtures",)

GOOD = {"model": "bytes", "prompt": "a", "max_tokens": 1}

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"top_n": 1}, "top_n", "did you mean 'top_p'?"), ({"Temperature": 1}, "Temperature", "'temperature'"),
    ({"x" * 300: 1}, "xxx", "unknown field"),
    ({"model": 1}, "model", "must be a string"), ({"model": None}, "model", "must be a string"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": []}, "prompt", "no list may be empty"), ({"prompt": [[]]}, "prompt", "may be empty"),
    ({"prompt": 1}, "prompt", "must be a string"), ({"prompt": [1, "a"]}, "prompt", "must be a string"),
    ({"prompt": [True]}, "prompt", "must be"), ({"prompt": [-1]}, "prompt", "must be"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"stream": 1}, "stream", "true or false"), ({"stream": "true"}, "stream", "true or false"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ({"stream_options": []}, "stream_options", "must be an object"),
    ({"n": 0}, "n", "greater than or equal to 1"), ({"n": 129}, "n", "128"), ({"n": "1"}, "n", "an integer"),
    ({"n": 1.5}, "n", "an integer"), ({"n": True}, "n", "an integer"),
    ({"seed": 2**64}, "seed", "less than"), ({"seed": "1"}, "seed", "an integer"),
    ({"stop": ""}, "stop", "1 to 256"), ({"stop": ["a"] * 5}, "stop", "at most 4"), ({"stop": [""]}, "stop", "1 to"),
    ({"stop": "x" * 257}, "stop", "256"), ({"stop": [1]}, "stop", "at most 4"),
    ({"max_tokens": -1}, "max_tokens", "greater"), ({"max_tokens": 10**7}, "max_tokens", "less"),
    ({"temperature": 2.1}, "temperature", "less"), ({"temperature": -0.1}, "temperature", "greater"),
    ({"temperature": "1"}, "temperature", "a number"), ({"temperature": True}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "greater than 0"), ({"top_p": 1.1}, "top_p", "less"), ({"top_k": -2}, "top_k", "greater"),
    ({"logprobs": 21}, "logprobs", "20"), ({"logprobs": True}, "logprobs", "an integer"),
    ({"echo": 0}, "echo", "true or false"),
    ({"presence_penalty": 3}, "presence_penalty", "less"), ({"frequency_penalty": -3}, "frequency_penalty", "greater"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"), ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {"1": True}}, "logit_bias", "numbers"), ({"logit_bias": []}, "logit_bias", "token ids"),
    ({"suffix": "x"}, "suffix", "inserted"), ({"best_of": 0}, "best_of", "ranked"), ({"user": 1}, "user", "a string"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: ascii(value)[:60])
def test_bad_fields_are_named(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    answer = post(client, {**GOOD, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param) and words in error["message"], error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 600
    assert not client.engine.handles


def post(client: TestClient, value: Any, path: str = "/v1/completions") -> Any:
    """Post JSON as a client in any language may write it: with lone surrogates, escaped."""
    import json

    return client.post(path, content=json.dumps(value), headers={"content-type": "application/json"})


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_numbers_are_finite(client: TestClient, value: str) -> None:
    body = f'{{"model": "bytes", "temperature": {value}}}'
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"


BODIES = [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000, b'{"model": "bytes", "n": 1' + b"0" * 5000 + b"}"]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:10]))
def test_bodies_are_objects(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_says_that_it_is_json(client: TestClient) -> None:
    answer = client.post("/v1/completions", content=b'{"model": "bytes"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_lone_surrogates_do_no_harm(client: TestClient) -> None:
    """In names of fields and of models; JSON may have them as escapes."""
    answer = post(client, {**GOOD, "\ud800": 1})
    assert answer.status_code == 400 and "Unicode" in answer.json()["error"]["message"]
    assert post(client, {**GOOD, "model": "\ud800"}).status_code == 404
    assert post(client, {**GOOD, "user": "\ud800"}).status_code == 200
    assert post(client, {**GOOD, "stop": "\ud800"}).json()["error"]["param"] == "stop"


def test_large_bodies_are_refused_at_once(client: TestClient) -> None:
    """Not with an error for each of a million fields."""
    many = {f"a{i}": 1 for i in range(2000)}
    assert "at most 200 fields" in post(client, {**GOOD, **many}).json()["error"]["message"]
    assert "at most 200" in post(client, {**GOOD, "stream_options": many}).json()["error"]["message"]
    assert "at most 1024" in post(client, {**GOOD, "logit_bias": many}).json()["error"]["message"]


def test_a_missing_field_is_named(client: TestClient) -> None:
    error = post(client, {"prompt": "a"}).json()["error"]
    assert error["param"] == "model" and error["code"] == "missing_required_parameter"
    assert post(client, {"prompt": "a", "modle": "x"}).json()["error"]["param"] == "modle"


@pytest.mark.parametrize("fields", [
    {"suffix": ""}, {"suffix": None}, {"stop": "a"}, {"top_k": 0}, {"top_k": 3}, {"seed": -(2**63)}, {"seed": 2**63},
    {"n": 1.0}, {"max_tokens": 1e0}, {"prompt": [1.0, 2]}, {"temperature": 0}, {"temperature": 2}, {"top_p": 1},
    {"stream": False}, {"best_of": None}, {"logit_bias": {"1": -100}}, {"stream_options": {}}], ids=str)
def test_good_fields_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert post(client, {**GOOD, **fields}).status_code == 200


def test_the_description_is_as_strict(client: TestClient) -> None:
    """No request has other fields; every answer that is sent is described."""
    api = client.get("/openapi.json").json()
    schemas = api["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "ChatMessage", "EmbeddingRequest", "TokenizeRequest",
                 "DetokenizeRequest", "TranslateRequest", "StreamOptions", "TextPart", "Completion"):
        assert schemas[name]["additionalProperties"] is False, name
    assert "HTTPValidationError" not in schemas
    bias = schemas["CompletionRequest"]["properties"]["logit_bias"]["anyOf"][0]
    assert bias["additionalProperties"] is False and list(bias["patternProperties"])
    operation = api["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert operation["responses"]["404"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
