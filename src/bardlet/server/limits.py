"""Limits on what clients send: size, time and form of a request's body, and the number of open files."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, NoReturn

from bardlet.server.errors import Refusal
from bardlet.server.security import Scope, header
from bardlet.server.settings import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SMALL = 4096
"""Bytes of a body from a client that is not signed in, and of a body that is checked without another thread."""
WAITING = ("/v1/completions", "/v1/chat/completions")
"""Paths whose requests wait in the engine's queue."""
UPLOAD = "/studio/files"
"""Path of requests whose body is a file."""
REFUSALS = 10
"""Refusals for a full queue per second: clients that come back at once would take the processor from the model."""
DEPTH = 64
"""Levels of lists and objects in a body."""
SPARE_FILES = 256
"""Open files that are left for models, logs and libraries."""


class Disconnected(Exception):
    """The client left before its request was complete."""


class Pace:
    """Lets its callers go on one after the other, a number of them per second."""

    def __init__(self, per_second: float) -> None:
        self.seconds, self.next = 1 / per_second, 0.0

    async def __call__(self) -> None:
        """Wait for one's turn."""
        await asyncio.sleep(self.seconds_from(asyncio.get_running_loop().time()))

    def seconds_from(self, now: float) -> float:
        """Take the next turn, and return the seconds until it comes."""
        self.next = max(self.next + self.seconds, now)
        return self.next - now


class Bodies:
    """ASGI middleware: read and check a request's body, then call the app with it."""

    def __init__(self, app: App, limits: Limits, busy: Callable[[], Exception | None] = lambda: None) -> None:
        """busy: the error of a request that would wait for the model, if none can now."""
        self.app, self.limits, self.busy, self.pace = app, limits, busy, Pace(REFUSALS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "POST" and scope["path"] == UPLOAD and scope.get("bardlet.signed_in"):
            check_upload(scope)
            await self.app(scope, self.paced(receive), send)  # its route reads the body part by part
            return
        most = self.limits.body if scope.get("bardlet.signed_in") else min(SMALL, self.limits.body)
        try:
            body = await self.read(scope, receive, most)
        except Disconnected:
            return
        if scope["method"] == "POST" and scope["path"] in WAITING and (error := self.busy()):
            await self.pace()  # and before any work: a flood must not slow down the requests that are served
            raise error
        if body and scope["method"] in ("POST", "PUT", "PATCH"):
            check_content_type(scope)
            if len(body) <= SMALL:
                check_json(body)
            else:
                await asyncio.to_thread(check_json, body)
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    def paced(self, receive: Receive) -> Receive:
        """Return `receive` for a file. Refuse one that arrives too slowly."""
        limits, started, size = self.limits, asyncio.get_running_loop().time(), 0

        async def next_part() -> Message:
            nonlocal size
            try:
                async with asyncio.timeout_at(started + limits.grace_seconds + size / limits.bytes_per_second):
                    message = await receive()
            except TimeoutError:
                raise too_late() from None
            size += len(message.get("body", b""))
            return message

        return next_part

    async def read(self, scope: Scope, receive: Receive, most: int) -> bytes:
        """Return the body. Refuse one of more than `most` bytes, and one that arrives too slowly."""
        declared = header(scope, b"content-length") or "0"
        if not declared.isdecimal() or int(declared[:20]) > most:
            raise too_large(most)
        limits, started, parts, size, more = self.limits, asyncio.get_running_loop().time(), [], 0, True
        while more:
            allowed = min(limits.body_seconds, limits.grace_seconds + size / limits.bytes_per_second)
            try:
                async with asyncio.timeout_at(started + allowed):
                    message = await receive()
            except TimeoutError:
                raise too_late() from None
            if message["type"] == "http.disconnect":
                raise Disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            scope["bardlet.body_read"] = not more
            if size > most:
                raise too_large(most)
        return b"".join(parts)


def too_late() -> Refusal:
    """Return the refusal of a body that arrives too slowly."""
    return Refusal(408, "The body of the request did not arrive in time; send it again, faster.",
                   code="request_timeout")


def too_large(most: int) -> Refusal:
    """Return the refusal of a body of more than `most` bytes."""
    return Refusal(413, f"The body has more than {most:,} bytes; send less.", code="body_too_large")


def check_content_type(scope: Scope) -> None:
    """Refuse a body that does not say that it is JSON: a form of another site could send it."""
    kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal(400, "The body must be JSON; send the header `Content-Type: application/json`.",
                      code="invalid_content_type")


def check_upload(scope: Scope) -> None:
    """Refuse a file whose type a form of another site could send."""
    if (header(scope, b"content-type") or "").strip().lower() != "application/octet-stream":
        raise Refusal(400, "The body must be a file; send the header `Content-Type: application/octet-stream`.",
                      code="invalid_content_type")


def check_json(body: bytes) -> None:
    """Refuse a body that is not JSON (RFC 8259), or that Python would read as something else."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"not valid UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_not_json, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _invalid(f"lists and objects more than {DEPTH} levels deep") from None
    except ValueError:  # an integer of thousands of digits
        raise _invalid("a number that is too large") from None
    _check_values(value)


def _check_values(value: object) -> None:
    """Refuse values that are nested too deeply, and texts that UTF-8 cannot encode."""
    level = [value]
    for _ in range(DEPTH + 1):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str):
                try:
                    each.encode()
                except UnicodeEncodeError:
                    raise _invalid("a text with half of a surrogate pair (\\ud800 to \\udfff)") from None
        if not inner:
            return
        level = inner
    raise _invalid(f"lists and objects more than {DEPTH} levels deep")


def _invalid(reason: str) -> Refusal:
    return Refusal(400, f"The body is not valid JSON: {reason}.", code="invalid_json")


def _not_json(name: str) -> NoReturn:
    raise _invalid(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _invalid("a number that is too large")
    return number


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _invalid("an object has the same name twice")
    return values


def most_connections(wanted: int) -> int:
    """Return the number of connections that may be open, after raising the limit on open files for them."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = wanted + 2 * SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < needed:
            raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        if soft != resource.RLIM_INFINITY:
            return max(16, min(wanted, soft - SPARE_FILES))
    return wanted
