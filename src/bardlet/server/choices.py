"""From the inference thread to the event loop: tokens become text there, and wait here until the client reads it.

A slow client does not slow the others down, and takes no more memory than its text: what is pending of a choice is
joined, and the event loop is woken once for a batch of news.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from threading import Lock
from typing import TYPE_CHECKING

from bardlet.errors import BardletError
from bardlet.server.text import Entry, Writer

if TYPE_CHECKING:
    from bardlet.inference.engine import Reason, Token


class Inbox:
    """Wakes the event loop when choices of a request have news: once, until it has looked."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._rung = Lock(), False

    def ring(self) -> None:
        """Wake the event loop. From any thread."""
        with self._lock:
            if self._rung:
                return
            self._rung = True
        with suppress(RuntimeError):  # the event loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Wait for news; collect them afterwards."""
        await self._event.wait()
        self._event.clear()
        with self._lock:
            self._rung = False


@dataclass
class News:
    """News of a choice since the last ones. prompt: its tokens with log-probabilities. reason: it has ended."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    prompt: list[Entry] | None = None
    reason: Reason | None = None
    error: BardletError | None = None


class Choice:
    """One sequence: the engine's listener, whose methods run in the inference thread.

    tokens: that the model wrote. first: time.monotonic() of the first one. prompt: the prompt's tokens, to be returned
    with log-probabilities. streams: ring for each token, not only at the end.
    """

    def __init__(self, inbox: Inbox, writer: Writer, prompt: Sequence[Entry] = (), streams: bool = False) -> None:
        self.tokens, self._inbox, self._writer, self._prompt, self._streams = 0, inbox, writer, prompt, streams
        self._lock, self._news, self._text = Lock(), News(), StringIO(newline="")
        self.first = math.inf

    def prompt(self, tokens: Sequence[Token]) -> None:
        """See `engine.Listener`. A prompt longer than the window has log-probabilities at its end only."""
        scored = list(self._prompt)
        first = len(scored) - len(tokens)
        for i, token in enumerate(tokens):
            if first + i >= 0:
                scored[first + i] = replace(scored[first + i], logprob=token.logprob, top=token.top)
        with self._lock:
            self._news.prompt = scored
        if self._streams:
            self._inbox.ring()

    def token(self, token: Token) -> bool:
        """See `engine.Listener`."""
        if not self.tokens:
            self.first = time.monotonic()
        self.tokens += 1
        text, entries, stopped = self._writer.feed(token)
        self._add(text, entries)
        return stopped

    def end(self, reason: Reason, error: BardletError | None) -> None:
        """See `engine.Listener`."""
        with self._lock:
            self._news.reason, self._news.error = reason, error
            text, entries = self._writer.finish()
            self._text.write(text)
            self._news.entries += entries
        self._inbox.ring()

    def collect(self) -> News:
        """Return the news since the last call. In the event loop."""
        with self._lock:
            news, self._news = self._news, News()
            text, self._text = self._text, StringIO(newline="")
        news.text = text.getvalue()
        return news

    def _add(self, text: str, entries: list[Entry]) -> None:
        if not text and not entries:
            return
        with self._lock:
            self._text.write(text)
            self._news.entries += entries
        if self._streams:
            self._inbox.ring()
