"""Decode tokens one by one."""

from __future__ import annotations

import codecs

from bardlet.tokenizer.base import Tokenizer


class StreamDecoder:
    """Decodes tokens one by one and returns only whole characters.

    The results of feed() and finish(), joined, equal decode() of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = True
        self._ids: list[int] = []  # if tokens have no bytes of their own: all ids so far, and the text already returned
        self._sent = ""

    def feed(self, token: int) -> str:
        """Return the text that this token completes; "" inside a multi-byte character."""
        if self.tokenizer.has_bytes:
            raw = self.tokenizer.bytes_of(int(token), self.skip_special)
            if self._begins and raw:
                self._begins = False
                raw = self.tokenizer.without_space(raw)
            return self._utf8.decode(raw)
        self._ids.append(int(token))
        text = self.tokenizer.decode(self._ids, self.skip_special)
        return "" if text.endswith("\ufffd") else self._send(text)

    def finish(self) -> str:
        """Return the rest: U+FFFD if the last character is incomplete."""
        if self.tokenizer.has_bytes:
            return self._utf8.decode(b"", final=True)
        return self._send(self.tokenizer.decode(self._ids, self.skip_special))

    def _send(self, text: str) -> str:
        new, self._sent = text[len(self._sent) :], text
        return new
