"""A client that leaves ends its sequences, whatever they were doing. With sockets, since that is how clients leave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fake_engine import FakeEngine
from small_server import app_of, registry

pytest_plugins = ("api_fixtures",)

WAIT = 10
"""Seconds after which a test gives up."""


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[tuple[int, FakeEngine]]:
    """A server with sockets: (port, its engine)."""
    engine = FakeEngine()
    config = uvicorn.Config(app_of(registry(root, engine)), port=0, log_level="warning", lifespan="off")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1], engine
        running.should_exit = True
        thread.join(WAIT)
    engine.close()


def request(port: int, path: str = "/v1/completions", **fields: Any) -> socket.socket:
    """Send a request and return its connection."""
    body = json.dumps({"model": "bytes", "max_tokens": 1000, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", port), WAIT)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Read until `end` has come."""
    text = b""
    while end not in text:
        text += connection.recv(1 << 16) or pytest.fail("the connection was closed")
    return text


def submitted(engine: FakeEngine, number: int) -> list[Any]:
    """Wait for sequences, and return the last ones."""
    with engine.news:
        assert engine.news.wait_for(lambda: len(engine.handles) >= number, WAIT)
    return engine.handles[-number:]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_a_client_that_leaves_cancels_its_sequences(server: tuple[int, FakeEngine], streams: bool,
                                                    running: bool) -> None:  # fmt: skip
    """Queued or running, streaming or not, all n of them."""
    port, engine = server
    engine.handles.clear()
    engine.script = lambda request: [97]
    engine.go.set() if running else engine.go.clear()
    with request(port, stream=streams, n=3, max_tokens=10**6) as connection:
        handles = submitted(engine, 3)
        if running and streams:
            assert connection.recv(100)
    assert all(handle.cancelled.wait(WAIT) and handle.ended.wait(WAIT) for handle in handles)
    engine.resume()


def test_a_client_that_reads_to_the_end_gets_all(server: tuple[int, FakeEngine]) -> None:
    """On a connection that goes on to the next request."""
    port, engine = server
    engine.handles.clear()
    engine.script = lambda request: [97]
    with request(port, stream=True, max_tokens=200) as connection:
        text = read_until(connection, b"0\r\n\r\n")
    assert text.count(b"[DONE]") == 1 and submitted(engine, 1)[0].written == 200


def test_others_go_on_when_a_client_leaves(server: tuple[int, FakeEngine]) -> None:
    port, engine = server
    engine.handles.clear()
    engine.go.clear()
    with request(port, max_tokens=5) as stays:
        submitted(engine, 1)
        with request(port, max_tokens=5):
            first, second = submitted(engine, 2)
        assert second.cancelled.wait(WAIT)
        assert not first.cancelled.is_set()
        engine.resume()
        read_until(stays, b'"completion_tokens":5')


def test_a_client_that_leaves_while_a_model_loads_stops_nobody(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load goes on, for the others."""

    async def main() -> None:
        engine = FakeEngine()
        models = registry(root, engine)
        entered, go = threading.Event(), threading.Event()
        read = models._read

        def slow(*arguments: Any) -> Any:
            entered.set()
            assert go.wait(WAIT)
            return read(*arguments)

        monkeypatch.setattr(models, "_read", slow)
        leaves, stays = (asyncio.create_task(models.get("bytes")) for _ in range(2))
        await asyncio.to_thread(entered.wait, WAIT)
        leaves.cancel()
        go.set()
        assert (await stays).name == "bytes" and leaves.cancelled() and len(engine.models) == 1
        engine.close()

    asyncio.run(main())
