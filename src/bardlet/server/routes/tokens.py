"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from bardlet.errors import BardletError
from bardlet.server.errors import Refusal
from bardlet.server.models import Loaded
from bardlet.server.reply import Reply
from bardlet.server.responses import ERRORS, Text, Tokens
from bardlet.server.routes.generation import Call, answer
from bardlet.server.schema import DetokenizeRequest, TokenizeRequest
from bardlet.server.validation import Route

router = APIRouter(route_class=Route, tags=["tokens"])


LINKS = {"text": {"operationId": "detokenize", "requestBody": {"model": "$response.body#/model",
                                                               "tokens": "$response.body#/tokens"}}}


@router.post("/tokenize", response_model=Tokens, responses={**ERRORS, 200: {"links": LINKS}})
async def tokenize(body: TokenizeRequest, request: Request) -> Any:
    """Return the token ids of a text, and each token as text."""
    async def work(call: Call, reply: Reply) -> None:
        await reply.json(await asyncio.to_thread(_tokenize, call.loaded, body))

    return answer(request, body.model, work)


@router.post("/detokenize", operation_id="detokenize", response_model=Text, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Any:
    """Return the text of token ids, with that of special tokens."""
    async def work(call: Call, reply: Reply) -> None:
        await reply.json(await asyncio.to_thread(_detokenize, call.loaded, body))

    return answer(request, body.model, work)


def _tokenize(loaded: Loaded, body: TokenizeRequest) -> dict[str, Any]:
    from bardlet.server.text import name_of

    model = loaded.model
    try:
        if body.add_start:
            ids = model.prompt_ids(body.text)
        else:
            model.tokenizer.check(body.text)
            ids = [int(i) for i in model.tokenizer.encode(body.text)]
    except BardletError as error:
        raise Refusal(400, f"text: {loaded.public(error)}", param="text", code="invalid_value") from None
    return {"model": loaded.name, "tokens": ids, "pieces": [name_of(model.tokenizer, i) for i in ids],
            "count": len(ids)}


def _detokenize(loaded: Loaded, body: DetokenizeRequest) -> dict[str, Any]:
    from bardlet.server.completion import checked_ids

    tokenizer = loaded.model.tokenizer
    ids = checked_ids(loaded, body.tokens, "tokens")
    return {"model": loaded.name, "text": tokenizer.decode(i for i in ids if i < tokenizer.vocab_size)}
