"""Errors of requests, in the format of the OpenAI API: the first one, with its field, in words."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bardlet.errors import printable
from bardlet.server.errors import Refusal
from bardlet.server.schema import LARGEST_SEED, UNSUPPORTED

NAMES = {"int_type": "must be an integer", "int_from_float": "must be an integer", "float_type": "must be a number",
         "bool_type": "must be true or false", "string_type": "must be a string", "list_type": "must be a list",
         "dict_type": "must be an object", "model_type": "must be an object",
         "model_attributes_type": "must be an object", "finite_number": "must be a finite number",
         "string_unicode": "has half of a surrogate pair, which is not a character", "none_required": "must be null",
         "missing": "is missing"}
"""The words for the types of pydantic's errors."""


class JSONRequest(Request):
    """A request whose 1.0 is the integer 1, as JSON Schema has it."""

    async def json(self) -> Any:
        """Return the body."""
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), parse_float=_number)
        return self._json


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if abs(value) <= LARGEST_SEED and value.is_integer() else value


class Route(APIRoute):
    """A route that answers an invalid request with 400 and OpenAI's error object."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """See `APIRoute`."""
        handler = super().get_route_handler()
        field = self.body_field
        model = field.field_info.annotation if field is not None else None

        async def handle(request: Request) -> Response:
            try:
                return await handler(JSONRequest(request.scope, request.receive))
            except RequestValidationError as error:
                raise refusal_of(error.errors(), model) from None
            except HTTPException as error:
                if error.status_code != 400:
                    raise
                raise Refusal(400, "the body cannot be read; send a JSON object in UTF-8") from None

        return handle


def refusal_of(errors: Sequence[Mapping[str, Any]], model: Any = None) -> Refusal:
    """Return the refusal for pydantic's errors. model: the request's, for the names of its fields.

    An unknown field comes first: a mistyped name is often why another field is missing.
    """
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    kind, path = str(error["type"]), [part for part in error["loc"] if part != "body"]
    if kind == "json_invalid":
        return Refusal(400, f"the body is not JSON: {error.get('ctx', {}).get('error', 'invalid')}, at character "
                       f"{error['loc'][-1]}")
    if kind == "string_unicode" and not path:
        return Refusal(400, "the name of a field is not valid Unicode")
    if kind == "too_many" and not path:
        return Refusal(400, f"the body {error['msg']}")
    if not path:
        return Refusal(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param, field = _joined(path), str(path[-1] if not isinstance(path[-1], int) or len(path) < 2 else path[-2])
    if kind == "extra_forbidden":
        return Refusal(400, f"unknown field {printable(param)}{_similar(field, path, model)}", param=param,
                       code="unknown_parameter")
    if kind == "missing":
        return Refusal(400, f"{param} is missing", param=param, code="missing_required_parameter")
    reason = next((UNSUPPORTED[str(part)] for part in reversed(path) if str(part) in UNSUPPORTED), None)
    return Refusal(400, f"{param}: {reason or NAMES.get(kind) or _in_words(str(error['msg']))}", param=param,
                   code="unsupported_value" if reason else "invalid_value")


def _joined(path: Sequence[Any]) -> str:
    """Return the place of an error as messages[0].content."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _similar(field: str, path: Sequence[Any], model: Any) -> str:
    """Return a suggestion for a mistyped field of the request itself."""
    if len(path) != 1 or not (isinstance(model, type) and issubclass(model, BaseModel)):
        return ""
    near = get_close_matches(field.lower(), model.model_fields, n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ""


def _in_words(message: str) -> str:
    """Return pydantic's message as the end of a sentence."""
    for start in ("Input should be ", "String should ", "List should ", "Dictionary should "):
        if message.startswith(start):
            rest = message.removeprefix(start)
            return f"must be {rest}" if start == "Input should be " else f"must {rest}"
    return message[:1].lower() + message[1:]
