"""Replies that fail, and the API inside the whole app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from fastapi.testclient import TestClient
from small_server import SETTINGS, events, registry

from bardlet.errors import BardletError
from bardlet.server import reply
from bardlet.server.app import create_app
from bardlet.server.errors import Refusal
from bardlet.server.reply import Answer, Context, Reply

pytest_plugins = ("api_fixtures",)


def answered(work: Callable[[Reply], Any], seconds: float = 10.0) -> Any:
    """Return the response of an app whose only route does `work`."""
    app = FastAPI()

    @app.get("/")
    async def root() -> Any:
        return Answer(work, Context(seconds))

    with TestClient(app) as client:
        return client.get("/")


def test_an_internal_error_tells_nothing() -> None:
    async def fails(to: Reply) -> None:
        raise ValueError("/secret")

    answer = answered(fails)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_an_error_of_a_user_is_told_without_paths(tmp_path: Path) -> None:
    async def fails(to: Reply) -> None:
        raise BardletError(f"{tmp_path}/m: damaged")

    answer = answered(fails)
    assert answer.status_code == 500 and answer.json()["error"]["message"].endswith("m: damaged")
    assert str(tmp_path) not in answer.text


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def fails(to: Reply) -> None:
        await to.event({"a": 1})
        raise Refusal(503, "no", code="gone")

    answer = answered(fails)
    first, last = events(answer.text)
    assert answer.status_code == 200 and first == {"a": 1} and last["error"]["code"] == "gone"


def test_work_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the load of a model from a slow disk; the openai client does not send it again."""
    monkeypatch.setattr(reply, "GRACE", 0.0)
    ended = []

    async def waits(to: Reply) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    answer = answered(waits, seconds=0.01)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout" and ended
    assert answer.headers["x-should-retry"] == "false"


def test_headers_say_how_to_read_a_stream() -> None:
    async def streams(to: Reply) -> None:
        await to.event({"text": "a\u2028\n\x00é"})
        await to.done()

    answer = answered(streams)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    assert list(events(answer.text)) == [{"text": "a\u2028\n\x00é"}, "[DONE]"]


def test_the_api_is_part_of_the_app(root: Path) -> None:
    """With its key and its figures."""
    engine = FakeEngine()
    settings = replace(SETTINGS, folders=(str(root),))
    body: dict[str, Any] = {"model": "bytes", "prompt": "abc", "max_tokens": 5}
    with TestClient(create_app(settings, registry(root, engine)), base_url="http://127.0.0.1:8000") as client:
        assert client.post("/v1/completions", json=body).status_code == 401
        client.headers["authorization"] = "Bearer key"
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 5
        assert client.post("/v1/completions", json={**body, "top": 1}).json()["error"]["param"] == "top"
        engine.busy = True
        assert client.post("/v1/completions", json=body).status_code == 429
        figures = client.get("/metrics").text
        for line in ("tokens_generated_total 5.0", "tokens_read_total 3.0", "first_token_seconds_count 1.0",
                     'refusals_total{reason="rate_limit_exceeded"} 1.0',
                     'refusals_total{reason="unknown_parameter"} 1.0'):
            assert f"bardlet_{line}" in figures, line
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions", "/v1/embeddings",
                "/tokenize", "/detokenize", "/translate"} <= paths.keys()
    assert engine.closed
