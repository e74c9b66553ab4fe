"""The outermost layer of the app: checks each request, adds headers to each response, and answers for every failure."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any

from starlette.responses import Response

from bardlet.server import files
from bardlet.server.errors import ClientTooSlow, Refusal, error_response, escaped, internal_error
from bardlet.server.limits import App, Message, Receive, Send
from bardlet.server.metrics import Metrics
from bardlet.server.security import HEADERS, Hosts, Origins, Scope, Sessions, check_key, check_query, header
from bardlet.server.settings import ServerSettings

log = logging.getLogger("bardlet")


class Traffic:
    """The requests that run now."""

    def __init__(self) -> None:
        self.stopping = False
        self.running: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """End every request; a stream gets an error event first."""
        self.stopping = True
        for task in self.running:
            task.cancel()


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
        self.scope, self.receive, self._send, self.seconds = scope, receive, send, seconds
        self.status = 0
        """The status of the response; 0 before it starts."""
        self.complete = self.too_slow = self.streams = False
        self.extra: dict[str, str] = {}
        """Headers of this response alone."""

    async def send(self, message: Message) -> None:
        """Send a part of the response. ClientTooSlow if the client does not read it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", [])}
            more = [(name.encode(), value.encode("latin-1")) for name, value in (HEADERS | self.extra).items()
                    if name.encode() not in given]
            headers = [*message.get("headers", []), *more]
            self.streams = any(name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                               for name, value in headers)
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            self.complete = True
        try:
            async with asyncio.timeout(self.seconds):
                await self._send(message)
        except TimeoutError:
            self.too_slow = True
            self.abort()  # closing would wait until the client has read the rest
            await asyncio.sleep(0)
            raise ClientTooSlow from None

    def abort(self) -> None:
        """Cut the connection."""
        if abort := self.scope.get("bardlet.abort"):
            abort()

    async def refuse(self, response: Response, linger: float) -> None:
        """Send a refusal. If the client still sends its body, discard that for a while: then it reads the refusal."""
        if self.status:
            return
        unread = not self.scope.get("bardlet.body_read") and any(
            name.lower() in (b"content-length", b"transfer-encoding") and value != b"0"
            for name, value in self.scope["headers"])
        if not unread:
            await response(self.scope, self.receive, self.send)
            return
        response.headers["connection"] = "close"
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        try:
            async with asyncio.timeout(linger):
                while (message := await self.receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, response: Response, linger: float) -> None:
        """Send an error response, or end a response that has started: a stream with an error event."""
        if not self.status:
            await self.refuse(response, linger)
        elif self.streams and not self.complete:
            event = b"data: " + bytes(response.body) + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
        elif not self.complete:
            self.abort()
            await asyncio.sleep(0)


class Guard:
    """ASGI middleware: the outermost layer."""

    def __init__(self, app: App, *, settings: ServerSettings, sessions: Sessions, metrics: Metrics,
                 traffic: Traffic) -> None:
        self.app, self.settings, self.sessions, self.metrics, self.traffic = app, settings, sessions, metrics, traffic
        self.hosts = Hosts(settings)
        self.origins = Origins(settings, self.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        exchange = Exchange(scope, receive, send, self.settings.limits.send_seconds)
        task = asyncio.current_task()
        assert task is not None
        self.traffic.running.add(task)
        try:
            if self.traffic.stopping:
                await exchange.fail(stopping(), 0)
            else:
                await self.handle(exchange)
        finally:
            self.traffic.running.discard(task)
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(scope["method"], route, exchange.status)
            if self.settings.log_requests:
                log.info("%s %s %s: %s in %.0f ms", escaped((scope.get("client") or ("-",))[0]),
                         escaped(scope["method"]), escaped(scope["path"]), exchange.status or "left",
                         1000 * (time.monotonic() - started))

    async def handle(self, exchange: Exchange) -> None:
        """Check the request and pass it on; turn whatever goes wrong into a response."""
        linger = self.settings.limits.linger_seconds
        try:
            response = self.check(exchange)
            if response is not None:
                await exchange.refuse(response, linger)
            else:
                await self.app(exchange.scope, exchange.receive, exchange.send)
        except Refusal as refusal:
            self.metrics.refused(refusal.code or refusal.type)
            response = refusal.response()
            if refusal.status == 401 and "text/html" in (header_or_none(exchange.scope, b"accept") or ""):
                response = files.page("home.html", 401, refusal.headers)  # a person reads it, and can sign in there
            await exchange.refuse(response, linger)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.traffic.stopping or task is None:
                raise
            task.uncancel()
            await exchange.fail(stopping(), 0)
        except Exception as error:
            if exchange.too_slow or isinstance(error, ClientTooSlow):
                self.metrics.refused("slow_reader")
                exchange.abort()
                return
            await exchange.fail(internal_error(error).response(), linger)

    def check(self, exchange: Exchange) -> Response | None:
        """Refuse a request that may not pass. Return the answer to a preflight request of an allowed page."""
        scope = exchange.scope
        host = self.hosts.check(scope)
        check_query(scope, self.sessions)
        origin = self.origins.check(scope, host)
        if self.origins.allowed:
            exchange.extra["vary"] = "Origin"
        if origin is not None:
            exchange.extra["access-control-allow-origin"] = origin
            if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None:
                return Response(status_code=204, headers={
                    "access-control-allow-methods": "GET, POST, DELETE", "access-control-max-age": "600",
                    "access-control-allow-headers": asked_headers(scope)})
        if not is_public(scope):
            check_key(scope, self.sessions, foreign=origin is not None)
            scope["bardlet.signed_in"] = True
        return None


def is_public(scope: Scope) -> bool:
    """Return True for requests that need no key: static files, /health and signing in. They reveal nothing."""
    method, path = scope["method"], scope["path"]
    if method in ("GET", "HEAD"):
        return path in ("/", "/health") or path in files.STATIC
    return method == "POST" and path == "/session"


def asked_headers(scope: Scope) -> str:
    """Return the headers that a preflight request asks for, if they are well-formed."""
    asked = header(scope, b"access-control-request-headers") or ""
    return asked if re.fullmatch(r"[\w\-, ]{1,1000}", asked, re.ASCII) else "authorization, content-type"


def header_or_none(scope: Scope, name: bytes) -> str | None:
    """Return a header's value; None if it is missing or occurs twice."""
    try:
        return header(scope, name)
    except Refusal:
        return None


def stopping() -> Response:
    """Return the response to a request that the end of the server cuts short."""
    return error_response(503, "The server is stopping; send the request again later.", type="server_error",
                          code="stopping")
