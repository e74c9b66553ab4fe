"""Requests of the API, as strict as they are described in /openapi.json.

A field that the server does not know is an error, and so is one of another type: a boolean is no number, "1" is no 1.
1.0 is an integer, as in JSON Schema.
Fields of the OpenAI API that bardlet has no use for are accepted with their neutral value; `UNSUPPORTED` says why with
any other. The names follow https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, ValidationError

MAX_CHOICES = 128
"""Sequences of one request: its prompts times n."""
MAX_TOKENS = 1_000_000
"""Tokens of the longest completion."""
MAX_MESSAGES = 10_000
MAX_FIELDS = 200
"""Fields of an object, known or not: each unknown one costs an error."""
MAX_BIASES = 1024
MAX_SCORED = 100_000
"""Tokens of one request with log-probabilities, which take 2 kB of memory each."""
MAX_STOPS = 4
LONGEST_STOP = 256
LARGEST_SEED = 9_223_372_036_854_776_000
"""2**63, rounded as in the OpenAI API: the description has limits as floating-point numbers."""


def few(most: int) -> BeforeValidator:
    """Return a validator that refuses a large object before pydantic makes an error for each of its fields."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_many", "must have at most {most} fields", {"most": most})
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    """An object without other fields, whose values have exactly the types of their fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(),
                              regex_engine="python-re")  # as the validators of JSON schemas in Python read a pattern

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return few(MAX_FIELDS).func(value)  # type: ignore[call-arg]


def one_message(text: str) -> WrapValidator:
    """Return a validator that replaces the errors of a union, of which pydantic lists one for each member."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("invalid", "{text}", {"text": text}) from None

    return WrapValidator(validate)


def _closed(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of logit_bias that it has no other keys."""
    for part in schema.get("anyOf", [schema]):
        if "patternProperties" in part:
            part["additionalProperties"] = False


Id = Annotated[int, Field(ge=0, le=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Short = Annotated[str, Field(max_length=1000)]

Prompt = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)],
    one_message("must be a string, a list of strings, a list of token ids, or a list of lists of token ids; no list "
                f"may be empty, and a request has at most {MAX_CHOICES} prompts"),
]  # fmt: skip
Stops = Annotated[
    Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None,
    one_message(f"must be a string of 1 to {LONGEST_STOP} characters, or a list of at most {MAX_STOPS} of them"),
]
LogitBias = Annotated[
    Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
              Field(max_length=MAX_BIASES), few(MAX_BIASES)] | None,
    one_message(f"must map at most {MAX_BIASES} token ids, written as strings, to numbers from -100 to 100"),
]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the numbers of tokens.")
    include_obfuscation: bool | None = Field(None, description="Accepted; a stream of bardlet is never padded.")


class Generation(Strict):
    """The fields that completions and chat completions share."""

    model: str = Field(description="A name from /v1/models.")
    stream: bool | None = Field(None, description="Send the text as server-sent events while it is written.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description=f"Choices for each prompt; 1 if absent. Prompts times n: at most {MAX_CHOICES}.")
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = Field(
        None, description="The same seed gives the same text, whatever else the server does: with one prompt, the "
        "texts of `bardlet sample --seed`. Without one, each text is different.")
    stop: Stops = Field(None, description="Up to four texts that end the completion; they are not part of it.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0: always the likeliest token. If absent: that of the model's generation_config.json, "
        "else 1.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Sample from the likeliest tokens with this total probability. If absent: that of the "
        "model's generation_config.json, else 1.")
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(
        None, description="Sample from the k likeliest tokens; 0 or -1: from all. If absent: that of the model's "
        "generation_config.json, else all.")
    presence_penalty: Penalty | None = Field(None, description="Subtracted from logits of tokens already written.")
    frequency_penalty: Penalty | None = Field(
        None, description="Subtracted from logits of tokens, for each time that they were already written.")
    logit_bias: LogitBias = Field(None, description="Added to the logits of token ids, which are written as strings.",
                                  json_schema_extra=_closed)
    user: str | None = Field(None, description="Accepted and ignored.")
    metadata: Annotated[dict[str, str], Field(max_length=16), few(16)] | None = Field(
        None, description="Accepted and ignored.")
    store: bool | None = Field(None, description="Accepted; nothing is stored.")


class CompletionRequest(Generation):
    """A text to continue."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": "my-qwen3", "prompt": "Once upon a time",
                                                             "max_tokens": 50}})
    prompt: Prompt | None = Field(
        None, description="The text to continue. Empty or absent: start a document. Of a prompt longer than the "
        "context window, the model reads the end, as in `bardlet sample`.")
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="Tokens to write at most; 16 if absent, as in the OpenAI API. 0 with echo and logprobs "
        "scores the prompt, which then has to fit into the context window.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Return the log-probability of each token, and of that number of the likeliest ones. "
        f"They are the model's own: before temperature, penalties and logit_bias. For at most {MAX_SCORED:,} tokens.")
    echo: bool | None = Field(None, description="Return the prompt before the completion.")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Only 1 or n: choices are not ranked.", json_schema_extra={"anyOf": [{"const": 1},
                                                                                             {"type": "null"}]})
    suffix: Literal[""] | None = None


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)],
    one_message('must be a string, or a list of parts {"type": "text", "text": ...}: the models read text only'),
]
NoneOf = Annotated[list[Any], Field(max_length=0)]


class ChatMessage(Strict):
    """A message of a conversation. The last fields are in answers of the API, and may come back empty."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], one_message(
        "must be system, developer, user or assistant; messages of tools and functions are not supported")]
    content: Content
    name: Short | None = Field(None, description="Accepted and ignored: the chat template has no names.")
    refusal: None = None
    tool_calls: NoneOf | None = None
    function_call: None = None
    audio: None = None
    annotations: NoneOf | None = None


class TextFormat(Strict):
    """The format of an answer: text."""

    type: Literal["text"]


_WITH_LOGPROBS: dict[str, Any] = {
    "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
    "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}}}
_ONE_LIMIT: dict[str, Any] = {"not": {"required": ["max_tokens", "max_completion_tokens"],
                      "properties": {"max_tokens": {"type": "integer"},
                                     "max_completion_tokens": {"type": "integer"}}}}


class ChatRequest(Generation):
    """A conversation to answer."""

    model_config = ConfigDict(json_schema_extra={
        "example": {"model": "my-chat", "messages": [{"role": "user", "content": "What is two and two?"}]},
        "allOf": [_WITH_LOGPROBS, _ONE_LIMIT]})
    messages: list[ChatMessage] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True,
        description="The conversation, which has to fit into the model's context window.")
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="The older name of max_completion_tokens.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="Tokens to write at most. An answer also ends where the context window is full.")
    logprobs: bool | None = Field(
        None, description="Return the log-probability of each token: the model's own, before temperature, penalties "
        "and logit_bias.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="With logprobs: return this number of the likeliest tokens, too.")
    response_format: TextFormat | None = None
    tools: NoneOf | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoneOf | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted and ignored: there are no tools.")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, description="Accepted; shared beginnings are found without it.")


class EmbeddingRequest(Strict):
    """Texts to embed."""

    model: str = Field(description="A name from /v1/models.")
    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]],
                    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)],
        one_message("must be a text, a list of texts, a list of token ids, or a list of lists of token ids; none may "
                    f"be empty, and a request has at most {MAX_CHOICES} texts"),
    ] = Field(description="Each text has to fit into the model's context window.")  # fmt: skip
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="Only the size of the model's vectors.")
    user: str | None = Field(None, description="Accepted and ignored.")


class TokenizeRequest(Strict):
    """A text to encode."""

    model: str = Field(description="A name from /v1/models.")
    text: str
    add_start: bool | None = Field(None, description="Begin as a prompt does: with the token that starts a document, "
                                   "where the model's training text had short documents.")


class DetokenizeRequest(Strict):
    """Token ids to decode."""

    model: str = Field(description="A name from /v1/models.")
    tokens: Annotated[list[Id], Field(fail_fast=True)]


class TranslateRequest(Strict):
    """Lines to translate."""

    model: str = Field(description="A name from /v1/models, of a model that was trained on sentence pairs.")
    text: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)],
        one_message(f"must be a string, or a list of 1 to {MAX_CHOICES} strings"),
    ] = Field(description="One line, or a list of lines.")
    beam: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="Beam width; 1 (greedy) if absent.")
    length_penalty: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None, description="Above 1: longer translations; 1 if absent.")


UNSUPPORTED = {
    "suffix": "text cannot be inserted before a suffix; leave it out",
    "best_of": "must be 1 or n: choices are not ranked",
    "response_format": 'the models write text only; leave it out, or send {"type": "text"}',
    "tools": "tools are not supported; leave them out, or send an empty list",
    "functions": "functions are not supported; leave them out, or send an empty list",
    "tool_choice": 'tools are not supported; leave it out, or send "none" or "auto"',
    "function_call": 'functions are not supported; leave it out, or send "none" or "auto"',
    "tool_calls": "tool calls are not supported; leave them out",
    "refusal": "must be null", "annotations": "must be empty",
    "modalities": 'the models write text only; leave it out, or send ["text"]',
    "audio": "audio is not supported; leave it out",
    "prediction": "predicted outputs are not supported; leave it out",
    "web_search_options": "the server does not search the web; leave it out",
    "reasoning_effort": 'the models do not reason before they answer; leave it out, or send "none"',
    "verbosity": 'the models have no levels of verbosity; leave it out, or send "medium"',
    "service_tier": 'there is one tier; leave it out, or send "auto" or "default"',
}
"""The message about a field with a value that bardlet does not support."""
