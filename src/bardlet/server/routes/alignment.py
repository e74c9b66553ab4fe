"""POST /studio/alignment: the cross-attention of a translation."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from bardlet.server.reply import Reply
from bardlet.server.routes.generation import Call, answer
from bardlet.server.schema import Strict
from bardlet.server.validation import Route

router = APIRouter(route_class=Route, include_in_schema=False, prefix="/studio")

Line = Annotated[str, Field(max_length=10_000)]


class AlignmentRequest(Strict):
    """A line and its translation."""

    model: str
    source: Line
    target: Line


@router.post("/alignment")
async def alignment(body: AlignmentRequest, request: Request) -> Any:
    """Return the weights of the cross-attention between the tokens of a line and those of its translation."""
    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server.alignment import align  # torch is imported with the first model

        await reply.json(await align(call.models, call.loaded, body.source, body.target))

    return answer(request, body.model, work)
