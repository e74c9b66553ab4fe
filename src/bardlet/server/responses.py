"""Answers of the API, as /openapi.json describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Closed(BaseModel):
    """An object without other fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorFacts(Closed):
    """An error. param: the field that it is about. code: its name, for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Closed):
    """The answer to a request that failed."""

    error: ErrorFacts


class ModelCard(Closed):
    """A model. max_model_len: the tokens of its context window. has_chat_template: /v1/chat/completions takes it.
    translates: /translate takes it.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    has_chat_template: bool
    translates: bool


class ModelList(Closed):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(Closed):
    """Tokens of the prompt that another sequence had read already."""

    cached_tokens: int


class Usage(Closed):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Closed):
    """Log-probabilities, a list item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Closed):
    """A completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Closed):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(Closed):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """A token of an answer, with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Closed):
    """Log-probabilities of an answer."""

    content: list[ChatTokenLogprob]
    refusal: None


class AnswerMessage(Closed):
    """The message of the assistant."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Closed):
    """An answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Closed):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Closed):
    """The vector of a text: numbers, or base64 of float32 numbers in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Closed):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Closed):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Tokens(Closed):
    """The answer of /tokenize. pieces: each token as text."""

    model: str
    tokens: list[int]
    pieces: list[str]
    count: int


class Text(Closed):
    """The answer of /detokenize."""

    model: str
    text: str


class Translations(Closed):
    """The answer of /translate: a translation for each line."""

    model: str
    translations: list[str]


def _error(description: str) -> dict[str, Any]:
    return {"model": Error, "description": description}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("The request is not valid: `param` names the field."),
    401: _error("The API key is missing or wrong."),
    403: _error("The request comes from a page of another site."),
    404: _error("No such model, or no such address."),
    408: _error("The request did not arrive in time."),
    413: _error("The body is too large."),
    421: _error("The Host header has an unknown name."),
    429: _error("The queue is full: try again after `Retry-After` seconds."),
    500: _error("The model's folder is damaged, or the model failed."),
    503: _error("No memory for the model now, or the server is shutting down."),
    504: _error("The request took longer than the server allows."),
    "4XX": _error("Another error of the request."),
}
"""The errors of every route. The last one keeps FastAPI from describing its own error, which is never sent."""

STREAM: dict[str, Any] = {
    "description": "The answer. With `stream`: server-sent events with one chunk each; the last event is [DONE]. An "
    "error after the first chunk is an event with `error`, and no [DONE] follows.",
    "content": {"text/event-stream": {"itemSchema": {
        "type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}}},
}
"""The description of an answer that may be a stream."""
