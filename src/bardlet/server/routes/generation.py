"""POST /v1/completions, /v1/chat/completions, /v1/embeddings and /translate: work of the inference thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from bardlet.server.errors import Refusal
from bardlet.server.models import Loaded, Models
from bardlet.server.reply import Answer, Context, Reply
from bardlet.server.responses import ERRORS, STREAM, ChatCompletion, Completion, Embeddings, Translations
from bardlet.server.schema import (
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TranslateRequest,
)
from bardlet.server.validation import Route

router = APIRouter(route_class=Route)


@dataclass
class Call:
    """A request with its model."""

    models: Models
    loaded: Loaded
    context: Context


Work = Callable[[Call, Reply], Awaitable[None]]


def answer(request: Request, name: str, work: Work) -> Answer:
    """Return the response that loads a model, does `work`, and stops when the client leaves."""
    models: Models = request.app.state.models
    context = Context(float(models.settings.timeout), getattr(request.app.state, "metrics", None))

    async def send(reply: Reply) -> None:
        async with models.use(name) as loaded:
            await work(Call(models, loaded, context), reply)

    return Answer(send, context)


@router.post("/v1/completions", response_model=Completion, responses={**ERRORS, 200: STREAM}, tags=["text"])
async def complete(body: CompletionRequest, request: Request) -> Any:
    """Continue a text, as `bardlet sample` does."""
    if body.best_of not in (None, 1, body.n or 1):
        raise Refusal(400, f"best_of: {UNSUPPORTED['best_of']}", param="best_of", code="unsupported_value")

    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server.completion import Completions  # torch is imported with the first model

        await Completions(call.models, call.loaded, body, call.context).answer(reply)

    return answer(request, body.model, work)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, 200: STREAM}, tags=["text"])
async def chat(body: ChatRequest, request: Request) -> Any:
    """Answer a conversation. The model needs a chat template, which `bardlet sft` adds."""
    limits = (body.max_tokens, body.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise Refusal(400, f"max_tokens is {limits[0]}, max_completion_tokens is {limits[1]}; both "
                      "name the same limit; send only one", param="max_tokens", code="invalid_value")
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs: needs logprobs = true", param="top_logprobs", code="invalid_value")

    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server.chat import Chat

        await Chat(call.models, call.loaded, body, call.context).answer(reply)

    return answer(request, body.model, work)


@router.post("/v1/embeddings", response_model=Embeddings, responses=ERRORS, tags=["text"])
async def embed(body: EmbeddingRequest, request: Request) -> Any:
    """Return a vector for each text: the mean of the model's final hidden states, of length 1.

    The models were not trained for this; an embedding model gives better vectors.
    """
    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server import vectors

        await vectors.embed(call.models, call.loaded, body, reply)

    return answer(request, body.model, work)


@router.post("/translate", response_model=Translations, responses=ERRORS, tags=["text"])
async def translate(body: TranslateRequest, request: Request) -> Any:
    """Translate lines, as `bardlet translate` does. For models that were trained on sentence pairs."""
    async def work(call: Call, reply: Reply) -> None:
        from bardlet.server import translation

        await translation.answer(call.models, call.loaded, body, reply)

    return answer(request, body.model, work)
