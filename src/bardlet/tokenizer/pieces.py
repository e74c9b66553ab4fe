"""Split a text into pieces that can be tokenized independently."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE = 1 << 14
"""Characters per piece: many small pieces keep all cores busy."""

# Positions where GPT-2's rule always starts a new word, whatever follows: white space after a non-space, and
# punctuation after a letter or digit. The classes are narrow so that they mean the same in every version of Unicode.
_WORD_START = re.compile(r"(?<=\S)(?=[ \n])|(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=[.,;:!?\u3001\u3002\uff0c\uff1b])")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Yield consecutive pieces of a text, of about `size` characters each.

    Cuts are at word starts, so that the pieces have the same BPE tokens as the whole text. Only a run of 32 * size
    characters without a word start (text without spaces) is cut anywhere.
    """
    start, end = 0, len(text)
    while end - start > size:
        cut = _last_cut(text, start, start + size)
        if cut is None:
            match = _WORD_START.search(text, start + size, min(end, start + 32 * size))
            cut = match.start() if match else min(end, start + 32 * size)
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:]


def _last_cut(text: str, start: int, end: int) -> int | None:
    """Return the last word start in (start, end]; search only the second half, its last 256 characters first."""
    for reach in (256, (end - start) // 2):
        cuts = [match.start() for match in _WORD_START.finditer(text, max(start + 1, end - reach), end)]
        if cuts:
            return cuts[-1]
    return None
