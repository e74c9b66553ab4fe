"""Split a text into pieces that can be tokenized independently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 14
"""Characters per piece: many small pieces keep all cores busy."""
BATCH = 32
"""Pieces that are encoded at once, which bounds the memory of encoding."""

# Positions where GPT-2's rule always starts a new word, whatever follows: white space after a non-space, and
# punctuation after a letter or digit. The classes are narrow so that they mean the same in every version of Unicode.
_WORD_START = re.compile(r"(?<=\S)(?=[ \n])|(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=[.,;:!?\u3001\u3002\uff0c\uff1b])")


def pieces(text: str | Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Yield consecutive pieces of a text, of about `size` characters each. Blocks give the pieces of the whole text.

    Cuts are at word starts, so that the pieces have the same BPE tokens as the whole text. Only a run of 32 * size
    characters without a word start (text without spaces) is cut anywhere.
    """
    buffer, start, longest = "", 0, 32 * size
    for block in (text,) if isinstance(text, str) else text:
        kept = max(0, start - 1)  # _WORD_START looks one character back
        buffer, start = buffer[kept:] + block, start - kept
        while len(buffer) - start >= longest:  # what follows cannot change the cut
            cut = _cut(buffer, start, size)
            yield buffer[start:cut]
            start = cut
    while len(buffer) - start > size:
        cut = _cut(buffer, start, size)
        yield buffer[start:cut]
        start = cut
    if start < len(buffer):
        yield buffer[start:]


def exact_pieces(blocks: Iterable[str], starts: re.Pattern[str], size: int = PIECE) -> Iterator[str]:
    """Yield consecutive pieces of a text that comes in blocks, of about `size` characters each.

    Cuts are at matches of `starts` only; text without a match stays in one piece.
    """
    waiting: list[str] = []
    length, needed = 0, 2 * size
    for block in blocks:
        waiting.append(block)
        length += len(block)
        if length >= needed:
            *whole, rest = _cut_at(starts, "".join(waiting), size)
            yield from whole
            waiting, length = [rest], len(rest)
            needed = 2 * max(size, length)  # text without a match is not searched again for each block
    yield from filter(None, _cut_at(starts, "".join(waiting), size))


def _cut_at(starts: re.Pattern[str], text: str, size: int) -> Iterator[str]:
    """Yield the pieces of a text, at least one, each up to the first match after `size` characters."""
    start = 0
    while match := starts.search(text, start + size):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _cut(text: str, start: int, size: int) -> int:
    """Return the end of the piece that begins at `start`."""
    cut = _last_cut(text, start, start + size)
    if cut is not None:
        return cut
    end = min(len(text), start + 32 * size)
    match = _WORD_START.search(text, start + size, end)
    return match.start() if match else end


def _last_cut(text: str, start: int, end: int) -> int | None:
    """Return the last word start in (start, end]; search only the second half, its last 256 characters first."""
    for reach in (256, (end - start) // 2):
        cuts = [match.start() for match in _WORD_START.finditer(text, max(start + 1, end - reach), end)]
        if cuts:
            return cuts[-1]
    return None


def batches(parts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yield the pieces of a text in groups of about `characters` characters; text without spaces has longer pieces."""
    batch: list[str] = []
    remaining = characters
    for piece in parts:
        batch.append(piece)
        remaining -= len(piece)
        if remaining <= 0:
            yield batch
            batch, remaining = [], characters
    if batch:
        yield batch


class Place:
    """Line and column in a text that is read in parts, from 1, as editors count."""

    def __init__(self) -> None:
        self.line, self.column = 1, 1

    def advance(self, parts: Iterable[str]) -> None:
        """Go to the end of the next parts of the text."""
        for part in parts:
            self.line, self.column = self._at(part, len(part))

    def describe(self, part: str, index: int) -> str:
        """Describe a character of the next part and its position, for a message."""
        char = part[index]
        name = f'"{char}"' if char.isprintable() else "a non-printable character"
        line, column = self._at(part, index)
        return f"{name} (U+{ord(char):04X}) at line {line}, column {column}"

    def _at(self, part: str, index: int) -> tuple[int, int]:
        start = part.rfind("\n", 0, index)
        return (self.line + part.count("\n", 0, index), self.column + index if start < 0 else index - start)
