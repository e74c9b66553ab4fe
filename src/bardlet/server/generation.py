"""The choices of a request: submitted to the engine, collected, and cancelled when the request ends, however it ends.

Imports torch, through the engine: import this module when a model is loaded.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from bardlet.errors import BardletError
from bardlet.inference import engine
from bardlet.inference.sampling import row_seeds
from bardlet.server.choices import Choice, Inbox, News
from bardlet.server.errors import Refusal, too_busy
from bardlet.server.models import Loaded, Models
from bardlet.server.reply import Context, too_late
from bardlet.server.schema import MAX_CHOICES, MAX_SCORED, Generation
from bardlet.server.text import Entry, Writer

CHUNK_SECONDS, MOST_CHUNK_SECONDS = 0.03, 0.15
"""Time between two chunks of a stream: the first for up to two sequences, more with more of them. Each chunk keeps the
inference thread from its work for a part of a millisecond."""
TAIL = 16
"""Tokens at the end of a prompt that may belong to a character that the text goes on with."""


@dataclass(frozen=True)
class Prompt:
    """A prompt. ids: those that the model reads, the last of `length`. entries: its tokens in its text, if their
    log-probabilities are asked for. in_character: the text may go on with the rest of the prompt's last character."""

    ids: list[int]
    length: int
    entries: Sequence[Entry] = ()
    in_character: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Options of a request's choices that its two kinds name differently. top: log-probabilities for each token."""

    max_tokens: int
    stop_ids: frozenset[int]
    top: int | None = None
    prompt_logprobs: bool = False


@dataclass
class Written:
    """A whole choice."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    prompt: list[Entry] = field(default_factory=list)
    finish_reason: str = "length"


class Sequences:
    """The sequences of a request: `n` for each prompt, in this order. Leaving the `with` block cancels them."""

    def __init__(self, models: Models, loaded: Loaded, body: Generation, context: Context) -> None:
        self.engine, self.loaded, self.body, self.context = models.engine, loaded, body, context
        self.most = min(MAX_CHOICES, max(1, models.settings.max_waiting))  # more would never find a place in the queue
        self._read, self._inbox = 0, Inbox()
        self._choices: list[Choice] = []
        self._handles: list[Any] = []

    def submit(self, prompts: Sequence[Prompt], plan: Plan) -> None:
        """Queue all sequences, or none. Refuse with 429 if the queue is full."""
        n, stops = self.body.n or 1, stop_strings(self.body)
        if len(prompts) * n > self.most:
            raise Refusal(400, f"{len(prompts)} prompts with n = {n} are {len(prompts) * n} choices, but a request has "
                          f"at most {self.most}; send fewer", param="n", code="invalid_value")
        scored = sum(plan.max_tokens + len(prompt.entries) for prompt in prompts) * n
        if plan.top is not None and scored * (1 + plan.top) > MAX_SCORED:
            raise Refusal(400, f"a request returns at most {MAX_SCORED:,} log-probabilities, all choices together; "
                          "lower max_tokens", param="max_tokens", code="invalid_value")
        tokenizer, sampling = self.loaded.model.tokenizer, self._sampling(plan.top)
        queued = []
        for prompt in prompts:
            seeds = row_seeds(secrets.randbits(32) if self.body.seed is None else self.body.seed, n)
            for seed in seeds:
                writer = Writer(tokenizer, prompt.ids[-TAIL:] if prompt.in_character else (), stops)
                choice = Choice(self._inbox, writer, prompt.entries, bool(self.body.stream))
                request = engine.Request(prompt=prompt.ids, max_tokens=plan.max_tokens, sampling=sampling, seed=seed,
                                         stop_ids=plan.stop_ids, prompt_logprobs=plan.prompt_logprobs,
                                         deadline=self.context.deadline)
                queued.append((request, choice))
        self._choices = [choice for _, choice in queued]
        try:
            self._handles = self.engine.submit(self.loaded.slot, queued)
        except engine.Busy as error:
            raise too_busy(error) from None
        except engine.Closed:
            raise stopping() from None
        except BardletError as error:
            raise Refusal(400, self.loaded.public(error)) from None
        self._read = sum(len(prompt.ids) for prompt in prompts)

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """Yield (number of the choice, its news) until all have ended.

        Raises:
            Refusal: a sequence failed, or the time is over.
        """
        running, sent = set(range(len(self._choices))), -math.inf
        while running:
            await self._inbox.wait()
            await asyncio.sleep(sent + self._pause() - time.monotonic())  # not at all if that is below 0
            sent = time.monotonic()
            for number in sorted(running):
                news = self._choices[number].collect()
                if news.reason is not None:
                    self._check(news)
                    running.discard(number)
                if news.text or news.entries or news.prompt or news.reason:
                    yield number, news

    def _pause(self) -> float:
        """Return the seconds between two chunks."""
        return min(MOST_CHUNK_SECONDS, CHUNK_SECONDS * max(1.0, self.engine.running / 2))

    async def whole(self) -> list[Written]:
        """Return all choices when they have ended. Raises as `news` does."""
        written = [Written() for _ in self._choices]
        async for number, news in self.news():
            one = written[number]
            one.text += news.text
            one.entries += news.entries
            one.prompt += news.prompt or []
            if news.reason is not None:
                one.finish_reason = news.reason
        return written

    def usage(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return the numbers of tokens."""
        read, written = sum(prompt.length for prompt in prompts), sum(choice.tokens for choice in self._choices)
        cached = sum(handle.cached_tokens for handle in self._handles[:: self.body.n or 1])  # a prompt counts once
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.cancel()
        self.context.count(self._read, sum(choice.tokens for choice in self._choices),
                           min((choice.first for choice in self._choices), default=math.inf))

    def _check(self, news: News) -> None:
        """Raise the refusal for a sequence that did not end by itself."""
        if news.error is not None:
            raise Refusal(500, self.loaded.public(news.error), type="server_error", code="generation_failed")
        if news.reason == "deadline":
            raise too_late(self.context.seconds)
        if news.reason == "cancelled":  # not by us: the `with` block is not left yet
            raise stopping()

    def _sampling(self, top: int | None) -> engine.Sampling:
        """Return the sampling options: the request's, else the model folder's, else OpenAI's."""
        body, defaults = self.body, self.loaded.defaults
        top_k = defaults.get("top_k") if body.top_k is None else body.top_k
        top_p = defaults.get("top_p") if body.top_p is None else body.top_p
        temperature = defaults.get("temperature", 1.0) if body.temperature is None else body.temperature
        size = self.loaded.model.module.config.vocab_size
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        if outside := [token for token in bias if token >= size]:
            raise Refusal(400, f"logit_bias: token id {outside[0]} is not in the vocabulary, whose ids are 0 to "
                          f"{size - 1}", param="logit_bias", code="invalid_value")
        return engine.Sampling(temperature=float(temperature), top_k=top_k if top_k and top_k > 0 else None,
                               top_p=None if top_p is None or top_p >= 1 else float(top_p), logit_bias=bias,
                               presence_penalty=body.presence_penalty or 0.0,
                               frequency_penalty=body.frequency_penalty or 0.0, top_logprobs=top)


def stopping() -> Refusal:
    """Return the refusal of a server that ends."""
    return Refusal(503, "the server is shutting down", type="server_error", code="shutting_down")


def stop_strings(body: Generation) -> list[str]:
    """Return the stop strings of a request."""
    return [body.stop] if isinstance(body.stop, str) else list(body.stop or [])


def identity(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """Return the fields with which every answer begins."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


async def in_engine(models: Models, work: Any) -> Any:
    """Return work(), done in the inference thread between two steps. Refuse if too much waits for that."""
    try:
        return await asyncio.wrap_future(models.engine.call(work))
    except engine.Busy as error:
        raise too_busy(error) from None
    except engine.Closed:
        raise stopping() from None
