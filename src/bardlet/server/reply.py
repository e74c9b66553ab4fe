"""Answers that end when the client leaves: queued, running, streaming or not.

`request.is_disconnected()` would have to be called again and again, and misses a disconnect that another reader has
seen. Here a task waits for it beside the work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from bardlet.errors import BardletError
from bardlet.server.errors import ClientTooSlow, Refusal, error_body, internal_error, public_message

log = logging.getLogger("bardlet")

GRACE = 5.0
"""Seconds after a request's time in which its error can be sent."""


class Reply:
    """The way back to a client: one JSON object, or a stream of events."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a JSON object, which is the whole answer."""
        body = _dumps(value)
        await self._start(status, {"content-type": "application/json", "content-length": str(len(body)),
                                   **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, value: Any) -> None:
        """Send an event of a stream; the first one starts it."""
        if not self.started:
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                                    "x-accel-buffering": "no"})
        await self._send({"type": "http.response.body", "body": b"data: " + _dumps(value) + b"\n\n",
                          "more_body": True})

    async def done(self) -> None:
        """End a stream."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun, which then lacks [DONE]."""
        body = error_body(str(refusal), type=refusal.type, param=refusal.param, code=refusal.code)
        if self.started:
            await self.event(body)
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self.json(body, refusal.status, refusal.headers)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


@dataclass
class Context:
    """A request's time, and the server's figures. metrics: `metrics.Metrics`, or None."""

    seconds: float
    metrics: Any = None
    started: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """time.monotonic() at which the request's time is over."""
        return self.started + self.seconds

    def count(self, read: int, generated: int, first: float) -> None:
        """Count tokens. first: time.monotonic() of the first one; infinite without any."""
        if self.metrics is None:
            return
        self.metrics.tokens(read=read, generated=generated)
        if generated:
            self.metrics.first_token(first - self.started)

    def refused(self, refusal: Refusal) -> None:
        """Count a refusal."""
        if self.metrics is not None:
            self.metrics.refused(refusal.code or refusal.type)


class Answer(Response):
    """The response of a route whose work takes time: it is cancelled as soon as the client leaves."""

    def __init__(self, work: Callable[[Reply], Awaitable[None]], context: Context) -> None:
        """work: sends the answer; it is cancelled, so that its `finally` runs."""
        super().__init__()
        self.work, self.context = work, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or stop when the client leaves."""
        work = asyncio.create_task(self._work(Reply(send)))
        gone = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, reply: Reply) -> None:
        try:
            async with asyncio.timeout(self.context.seconds + GRACE):
                try:
                    await self.work(reply)
                except Refusal as refusal:
                    self.context.refused(refusal)
                    await reply.refuse(refusal)
                except (ConnectionError, ClientTooSlow):
                    raise
                except BardletError as error:
                    await reply.refuse(Refusal(500, public_message(error), type="server_error"))
                except Exception as error:
                    await reply.refuse(internal_error(error))
        except TimeoutError:
            if reply.started:
                raise ClientTooSlow from None
            await reply.refuse(too_late(self.context.seconds))


def too_late(seconds: float) -> Refusal:
    """Return the refusal of a request that took too long; its header keeps the openai client from repeating it."""
    refusal = Refusal(504, f"the request was not finished in {seconds:g} seconds, the server's limit; ask for fewer "
                      "tokens, or stream", type="server_error", code="timeout")
    refusal.headers = {"x-should-retry": "false"}
    return refusal


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


def _dumps(value: Any) -> bytes:
    """Return JSON in ASCII: no control character or line separator of a text can break the lines of a stream."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
