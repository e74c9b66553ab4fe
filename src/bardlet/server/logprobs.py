"""Log-probabilities in the two forms of the OpenAI API. JSON has no infinity: it is written as -9999."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bardlet.server.text import Entry, bytes_of, name_of
from bardlet.tokenizer import Tokenizer

LOWEST = -9999.0


def finite(value: float) -> float:
    """Return a log-probability that JSON can hold."""
    return value if math.isfinite(value) else LOWEST


def of_completion(tokenizer: Tokenizer, entries: Sequence[Entry], top: int, offset: int = 0) -> dict[str, Any]:
    """Return the log-probabilities of a completion. offset: characters of the answer before the entries' text.

    As in the OpenAI API, `top_logprobs` has the chosen token beside the `top` likeliest ones.
    """
    return {
        "tokens": [name_of(tokenizer, entry.id) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": [_table(tokenizer, entry, top) for entry in entries] if top else None,
        "text_offset": [offset + entry.start for entry in entries],
    }


def _table(tokenizer: Tokenizer, entry: Entry, top: int) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    chosen = (entry.id, entry.logprob)
    return {name_of(tokenizer, token): finite(value) for token, value in [chosen, *entry.top[:top]][::-1]}


def of_chat(tokenizer: Tokenizer, entries: Sequence[Entry], top: int) -> dict[str, Any]:
    """Return the log-probabilities of an answer in a chat."""
    return {"content": [{**_token(tokenizer, entry.id, entry.logprob),
                         "top_logprobs": [_token(tokenizer, *pair) for pair in entry.top[:top]]} for entry in entries],
            "refusal": None}


def _token(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    return {"token": name_of(tokenizer, token), "logprob": LOWEST if logprob is None else finite(logprob),
            "bytes": bytes_of(tokenizer, token)}
