"""Refusals in the format of the OpenAI API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

log = logging.getLogger("bardlet")

INVALID = "invalid_request_error"
"""The `type` of an error that the client can fix."""


class Error(JSONResponse):
    """JSON in ASCII: a terminal that shows an error sees no control character of a client's text."""

    def render(self, content: Any) -> bytes:
        """See `JSONResponse`."""
        return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()


class ClientTooSlow(Exception):
    """The client left a response unread for too long."""


class Refusal(Exception):
    """An error response, raised anywhere below a route; the app sends it."""

    def __init__(self, status: int, message: str, *, type: str = INVALID, param: str | None = None,
                 code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code
        self.headers: dict[str, str] = {}

    def response(self) -> JSONResponse:
        """Return the response of this refusal."""
        return error_response(self.status, str(self), type=self.type, param=self.param, code=self.code,
                              headers=self.headers)


def internal_error(error: BaseException) -> Refusal:
    """Log an internal error, and return a refusal that names its entry in the log and nothing else."""
    number = secrets.token_hex(4)
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("internal error %s: %s: %s; report this traceback\n%s", number, type(error).__name__, escaped(error),
              frames)
    return Refusal(500, f"Internal error {number}; the log of the server has the details.", type="server_error",
                   code="internal_error")


def too_busy(error: Any) -> Refusal:
    """Return the refusal for `engine.Busy`."""
    refusal = Refusal(429, str(error), type="rate_limit_error", code="rate_limit_exceeded")
    refusal.headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return refusal


def error_body(message: str, *, type: str = INVALID, param: str | None = None,
               code: str | None = None) -> dict[str, Any]:
    """Return the body of an error, which is also the data of an error event in a stream."""
    return {"error": {"message": sendable(message), "type": type, "param": sendable(param), "code": code}}


def error_response(status: int, message: str, *, type: str = INVALID, param: str | None = None,
                   code: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response of a refusal."""
    return Error(error_body(message, type=type, param=param, code=code), status, dict(headers or {}))


def sendable(text: str | None) -> Any:
    """Return a text that UTF-8 can encode: lone surrogates are replaced."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def escaped(text: object, most: int = 500) -> str:
    """Return a client's text for a line of the log: control characters as escape sequences, and not too long."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
                   for char in str(text)[:most])
    return line + "..." * (len(str(text)) > most)


def public_message(error: BaseException, folders: Iterable[str] = ()) -> str:
    """Return an error's message without paths of this machine.

    folders: the folders of the models, for which the message then has their names alone.
    """
    message = str(error)
    known = {str(each) for folder in folders for each in (folder, os.path.abspath(folder), Path(folder).resolve())}
    for folder in sorted(known, key=len, reverse=True):
        if (name := os.path.basename(os.path.abspath(folder))) and re.search(r"\w[\\/]|[\\/]\w", folder):
            message = message.replace(folder, name)
    for place in sorted({os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir()}, key=len, reverse=True):
        if len(place) > 1:
            message = re.sub(rf"{re.escape(place)}[^\s:;,'\"`)]*", _last, message)
    return re.sub(r"(?<![\w.\-:/])(?:[A-Za-z]:[\\/]|/)[^\s:;,'\"`)]+", _last_of_machine, message)


def _last(match: re.Match[str]) -> str:
    """Return the last part of a path."""
    return re.split(r"[\\/]", match[0].rstrip("\\/"))[-1]


def _last_of_machine(match: re.Match[str]) -> str:
    """Return the last part of a path if it begins in a folder of this machine's root: /v1/models stays as it is."""
    root = re.match(r"[A-Za-z]:[\\/]|/[^/]+", match[0])
    return _last(match) if root and (root[0][1:2] == ":" or os.path.exists(root[0])) else match[0]
