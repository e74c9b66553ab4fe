"""The text of one choice, token by token: whole characters, cut at a stop string.

Text that may be the beginning of a stop string is held back until it is clear that it is not. Nothing of the rest is
ever released once a stop string is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bardlet.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from bardlet.inference.engine import Token

TAIL = 64
"""Last ids of a prompt that a decoder reads: a character has at most four bytes, so at most a few tokens."""
LONGEST = 128
"""Ids after which a decoder starts again that decodes all its ids for each new one (see `StreamDecoder`)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A token with its place in the text, for log-probabilities: it wrote the characters from start to end."""

    id: int
    start: int
    end: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Pieces:
    """Decodes tokens one by one, in bounded time for each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._ids: list[int] = []  # if tokens have no bytes of their own

    def feed(self, token: int) -> str:
        """Return the text that a token completes; ids that pad the vocabulary have none."""
        if token >= self.tokenizer.vocab_size:
            return ""
        piece = self._decoder.feed(token)
        if not self.tokenizer.has_bytes:
            self._ids.append(token)
            if piece and len(self._ids) > LONGEST:
                self._ids = self._ids[-TAIL // 4 :]
                self._decoder = StreamDecoder(self.tokenizer, skip_special=True)
                for earlier in self._ids:
                    self._decoder.feed(earlier)
        return piece

    def finish(self) -> str:
        """Return the rest: U+FFFD if the last character is incomplete."""
        return self._decoder.finish()


def entries_of(tokenizer: Tokenizer, ids: Sequence[int], hidden: int = 0) -> tuple[str, list[Entry]]:
    """Return the text of a prompt, without that of its first `hidden` tokens, and all its tokens."""
    pieces, entries, parts, length = Pieces(tokenizer), [], [], 0
    for i, token in enumerate(ids):
        piece = pieces.feed(token) if i >= hidden else ""
        entries.append(Entry(token, length, length + len(piece)))
        parts.append(piece)
        length += len(piece)
    return "".join(parts), entries


class Writer:
    """The text of one choice, as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        """prompt: the ids before the text, which may end inside a character."""
        self._pieces, self._stops = Pieces(tokenizer), tuple(stops)
        self._longest = max(map(len, stops), default=1)
        for token in prompt[-TAIL:]:
            self._pieces.feed(int(token))
        self._held, self._released, self._decoded, self._stopped = "", 0, 0, False
        self._waiting: deque[Entry] = deque()

    def feed(self, token: Token) -> tuple[str, list[Entry], bool]:
        """Return (new text, the tokens with log-probabilities that are whole in it, True if a stop string is complete).
        """
        piece = self._pieces.feed(token.id)
        start, self._decoded = self._decoded, self._decoded + len(piece)
        if token.logprob is not None:  # otherwise nobody asks for the tokens
            self._waiting.append(Entry(token.id, start, self._decoded, token.logprob, token.top))
        return self._release(piece)

    def finish(self) -> tuple[str, list[Entry]]:
        """Return the text that was held back, as no stop string came, with its tokens."""
        if self._stopped:  # the rest of the last token may be half a character
            return "", []
        text, entries, stopped = self._release(self._pieces.finish())
        if stopped:
            return text, entries
        rest, self._held = self._held, ""
        entries += self._waiting
        self._waiting.clear()
        return text + rest, entries

    def _release(self, piece: str) -> tuple[str, list[Entry], bool]:
        text = self._held + piece
        if not self._stops:
            self._released += len(text)
            return text, self._whole(), False
        complete = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if complete:
            _, cut = min(complete)
            self._held, self._stopped = "", True
            self._released += cut
            entries = [entry for entry in self._waiting if entry.start < self._released or entry.end <= self._released]
            self._waiting.clear()
            return text[:cut], entries, True
        held = self._beginning(text)
        self._held = text[len(text) - held :]
        self._released += len(text) - held
        return text[: len(text) - held], self._whole(), False

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _whole(self) -> list[Entry]:
        entries = []
        while self._waiting and self._waiting[0].end <= self._released:
            entries.append(self._waiting.popleft())
        return entries


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text: "bytes:\\xe2\\x82" for a part of a character, "token_id:N" for an id without text."""
    if token >= tokenizer.vocab_size:
        return f"token_id:{token}"
    if not tokenizer.has_bytes:
        return tokenizer.decode([token]) or str(tokenizer.inner.id_to_token(token) or f"token_id:{token}")
    raw = tokenizer.bytes_of(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def bytes_of(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """Return the UTF-8 bytes of a token; None if they are not known."""
    if token >= tokenizer.vocab_size:
        return None
    if tokenizer.has_bytes:
        return list(tokenizer.bytes_of(token))
    text = tokenizer.decode([token])
    return None if "\ufffd" in text else list(text.encode())
