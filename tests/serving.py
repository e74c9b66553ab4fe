"""A server of `bardlet serve` in this process, with routes of the tests in place of models, and raw HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from bardlet.errors import BardletError
from bardlet.server import app as server_app
from bardlet.server import protocol
from bardlet.server.errors import Refusal
from bardlet.server.settings import Limits, ServerSettings

KEY = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {KEY}"}
HANGS = 60
"""Seconds after which a socket counts as hanging: no machine is that slow."""

router = APIRouter()


class Text(BaseModel):
    """A body with one field."""

    model_config = ConfigDict(extra="forbid")
    text: str


@router.post("/echo")
async def echo(body: Text) -> dict[str, str]:
    """Return the text."""
    return {"text": body.text}


@router.post("/raw")
async def raw(request: Request) -> dict[str, int]:
    """Return the length of the body."""
    return {"bytes": len(await request.body())}


@router.get("/fail")
async def fail(kind: str = "") -> None:
    """Raise an error that names a path."""
    if kind == "user":
        raise BardletError("/etc/passwd: no such model; see /v1/models")
    if kind == "refusal":
        raise Refusal(409, "no")
    raise RuntimeError("secret of /home/somebody\x1b[2J")


@router.get("/stream")
async def stream(endless: bool = False, broken: bool = False) -> StreamingResponse:
    """Return a stream of events: one, or as many as the client reads."""

    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        if broken:
            raise RuntimeError("secret")
        while endless:
            yield f"data: {'x' * 65_536}\n\n"
        await asyncio.Event().wait()

    return StreamingResponse(events(), media_type="text/event-stream")


left = threading.Event()
"""Set when the client of /wait has left."""


@router.post("/wait")
async def wait(request: Request) -> dict[str, str]:
    """Wait until the client leaves."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)
    left.set()
    return {}


def make_app(**settings: Any) -> Any:
    """Return an app with the routes above."""
    settings = {"folders": (), "api_key": KEY, "memory_gb": 1.0, **settings}
    app = server_app.create_app(ServerSettings(**settings), None)
    app.include_router(router)
    return app


class Running(uvicorn.Server):
    """A server in a thread."""

    app: Any
    port: int

    def connect(self) -> Connection:
        """Return a new connection."""
        return Connection(self.port)


class Connection:
    """A connection that sends and receives bytes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=HANGS)
        self.port = port

    def send(self, *lines: str, body: bytes = b"") -> Connection:
        """Send a head, with a Host header in front, and a body."""
        head = [lines[0], f"Host: 127.0.0.1:{self.port}", *lines[1:], "", ""]
        return self.send_bytes("\r\n".join(head).encode("latin-1") + body)

    def send_bytes(self, data: bytes) -> Connection:
        """Send bytes."""
        self.socket.sendall(data)
        return self

    def until_closed(self) -> bytes:
        """Return everything that the server sends until it closes the connection."""
        data = b""
        try:
            while part := self.socket.recv(65_536):
                data += part
        except ConnectionResetError:
            pass
        finally:
            self.socket.close()
        return data

    def until(self, end: bytes) -> bytes:
        """Return what the server sends up to `end`."""
        data = b""
        while end not in data:
            part = self.socket.recv(65_536)
            assert part, data
            data += part
        return data

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


@contextmanager
def running(limits: Limits | None = None, **settings: Any) -> Iterator[Running]:
    """Yield a server on a free port."""
    app = make_app(limits=limits or Limits(linger_seconds=0.5), **settings)
    started = threading.Event()
    with protocol.bind("127.0.0.1", 0) as listener:
        server: Any = protocol.make_server(app, app.state.settings, app.state.traffic.stop, started.set)
        server.app, server.port = app, listener.getsockname()[1]
        server.connect = lambda: Connection(server.port)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert started.wait(HANGS)
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join(HANGS)
            assert not thread.is_alive()
