"""The network side: uvicorn with limits on connections, its socket, and its end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bardlet.errors import BardletError
from bardlet.server.errors import error_response
from bardlet.server.limits import Receive, Send
from bardlet.server.security import HEADERS, Scope, as_address
from bardlet.server.settings import Limits, ServerSettings

HEAD_BYTES = 32 * 1024
"""Bytes of the head of a request."""

QUEUE = 2048
"""Connections that wait to be accepted."""
ACCEPTED = 64
"""Connections that are accepted at once: asyncio counts them only later, so they need open files to spare."""


class Protocol(H11Protocol):
    """A connection of uvicorn that also limits the time of a head, and makes room for new connections."""

    limits = Limits()
    idle: dict[Protocol, None]
    """Open connections without a request, the oldest first."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.inner: Any = self.app
        self.app = self.limited
        self.head_timer: asyncio.TimerHandle | None = None

    async def limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, unless every connection that may be open has a request."""
        scope["bardlet.abort"] = self.transport.abort
        if len(self.connections) - len(self.idle) > self.limits.connections:
            refusal = error_response(503, "Too many connections; send the request again later.", type="server_error",
                                     code="too_many_connections",
                                     headers=HEADERS | {"retry-after": "1", "connection": "close"})
            await refusal(scope, receive, send)
        else:
            await self.inner(scope, receive, send)

    @property
    def has_request(self) -> bool:
        """True from the end of a request's head to the end of its response."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; too many: close the oldest one without a request."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and self.idle:
            oldest = next(iter(self.idle))
            del self.idle[oldest]  # the next connection may come before it is gone
            oldest.transport.abort()
        self.idle[self] = None
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self.idle.pop(self, None)
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read bytes of a client. The time of a head begins with its first byte."""
        if not self.has_request:
            self._start_head()
        super().data_received(data)
        if self.has_request:
            self.idle.pop(self, None)
            self._end_head()
        if self.flow.read_paused and self.conn.their_state is h11.DONE:  # the next request is here already
            if len(self.conn.trailing_data[0]) > HEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()  # otherwise nobody would notice that the client leaves

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.idle[self] = None
        super().on_response_complete()
        if self.has_request:  # it was there already (pipelining)
            self.idle.pop(self, None)

    def _start_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)

    def _end_head(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _head_is_late(self) -> None:
        """Close the connection; a client that began a request gets a 408."""
        self.head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            self._answer(408, "The head of the request did not arrive in time.", "request_timeout")
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP, in the format of every other refusal."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(400, "The request is not valid HTTP.", "invalid_http")
        self.transport.close()

    def _answer(self, status: int, message: str, code: str) -> None:
        response = error_response(status, message, code=code, headers=HEADERS | {"connection": "close"})
        for event in (h11.Response(status_code=status, headers=response.raw_headers),
                      h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


class Server(uvicorn.Server):
    """A uvicorn that says when it answers, and ends streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None], ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.stop, self.ready = stop, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End every request, then the server."""
        self.stop()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address.

    Raises:
        BardletError: the port is in use (the message proposes another one), not allowed, or the host is not here.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise BardletError(f"--host {host}: no such name; use an address of this machine, such as 127.0.0.1") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # a restart need not wait for a minute; on Windows the option would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(QUEUE)  # so that a second server sees that the port is in use
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BardletError(f"--port {port}: another program uses it, perhaps a `bardlet serve` that still runs; "
                               f"try --port {free_port(host, port)}") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise BardletError(f"--port {port}: this user may not use it; try --port {free_port(host, 8000)}") from None
        raise BardletError(f"--host {host}: not an address of this machine; use 127.0.0.1 for programs here, or "
                           "0.0.0.0 for all networks") from None
    listener.setblocking(False)
    return listener


def free_port(host: str, port: int) -> int:
    """Return a free port, one of the next ones if possible."""
    for candidate in (*range(port + 1, min(port + 20, 65_536)), 0):
        try:
            with socket.create_server((host.strip("[]"), candidate),
                                      family=socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
                return int(trial.getsockname()[1])
        except OSError:
            continue
    return port + 1


def url(host: str, port: int) -> str:
    """Return the address of a server for this machine's browser."""
    known = as_address(host)
    if known is not None and known.is_unspecified:
        host = "[::1]" if known.version == 6 else "127.0.0.1"
    elif known is not None and known.version == 6:
        host = f"[{known}]"
    return f"http://{host}:{port}"


def make_server(app: Any, settings: ServerSettings, stop: Callable[[], None],
                ready: Callable[[], None] = lambda: None) -> Server:
    """Return the server of an app. stop: called first at its end. ready: called when it answers."""
    limits = settings.limits
    bounded = type("BoundedProtocol", (Protocol,), {"limits": limits, "idle": {}})
    config = uvicorn.Config(
        app, http=bounded, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
        backlog=ACCEPTED, server_header=False, timeout_keep_alive=limits.keep_alive_seconds,
        h11_max_incomplete_event_size=HEAD_BYTES, timeout_graceful_shutdown=limits.shutdown_seconds)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client that does not speak HTTP is no news
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # nor is one that leaves while it is written to
    return Server(config, stop, ready)
