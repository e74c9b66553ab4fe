"""The routes of the studio's tab Inside. They are not part of the API that /docs describes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from bardlet.server.reply import Reply
from bardlet.server.routes.generation import Call, answer
from bardlet.server.routes.studio import studio_of
from bardlet.server.schema import Id, Strict
from bardlet.server.validation import Route

router = APIRouter(route_class=Route, include_in_schema=False, prefix="/studio")

Name = Annotated[str, Field(max_length=500)]
Text = Annotated[str, Field(max_length=20_000)]
Count = Annotated[int, Field(ge=0, le=200)]
Head = Annotated[list[Id], Field(min_length=2, max_length=2)]


class Look(Strict):
    """A text to look at. off: heads to switch off, [layer, head], counted from 0. tokens: of the continuation."""

    model: Name
    text: Text
    off: Annotated[list[Head], Field(max_length=4096, fail_fast=True)] = Field(default_factory=list)
    tokens: Count = 60


class Near(Strict):
    """A token whose neighbors are asked for."""

    model: Name
    token: Id


class Climb(Strict):
    """A text for every rung of a ladder. model: a rung of it. tokens: of each continuation."""

    model: Name
    text: Text
    tokens: Count = 60


@router.post("/inside")
async def look(body: Look, request: Request) -> Any:
    """Return the values that a model computes from a text."""
    studio_of(request)

    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server import inside  # torch is imported with the first model

        off = sorted({(layer, head) for layer, head in body.off})
        await reply.json(await inside.look(call.models, call.loaded, body.text, off, body.tokens))

    return answer(request, body.model, work)


@router.post("/neighbors")
async def neighbors(body: Near, request: Request) -> Any:
    """Return the tokens whose embeddings are nearest to a token's."""
    studio_of(request)

    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server import inside

        await reply.json(await inside.near(call.models, call.loaded, body.token))

    return answer(request, body.model, work)


@router.post("/rungs")
async def rungs(body: Climb, request: Request) -> Any:
    """Return the loss and the continuation of a text for each rung of a ladder."""
    studio_of(request)

    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server import inside

        await reply.json(await inside.climb(call.models, call.loaded, body.text, body.tokens))

    return answer(request, body.model, work)
