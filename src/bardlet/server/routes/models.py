"""GET /v1/models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from bardlet.server.responses import ERRORS, ModelCard, ModelList
from bardlet.server.validation import Route

router = APIRouter(route_class=Route, tags=["models"])


LINKS = {"first": {"operationId": "get_model", "parameters": {"name": "$response.body#/data/0/id"}}}


@router.get("/v1/models", response_model=ModelList, responses={**ERRORS, 200: {"links": LINKS}})
async def list_models(request: Request) -> dict[str, Any]:
    """List the models. Runs that appeared since the start of the server are among them."""
    return {"object": "list", "data": await asyncio.to_thread(request.app.state.models.cards)}


@router.get("/v1/models/{name:path}", operation_id="get_model", response_model=ModelCard, responses=ERRORS)
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """Describe a model. Its name may contain slashes."""
    card: dict[str, Any] = await asyncio.to_thread(request.app.state.models.card, name)
    return card
