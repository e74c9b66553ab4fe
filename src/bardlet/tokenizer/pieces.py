"""Pieces of a text that can be encoded by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE = 1 << 14
"""Characters given to the library at once: many small pieces keep all cores busy."""

# Where GPT-2's rule always begins a new word, whatever follows: at white space after something else, and
# at punctuation after a letter or digit. The classes are narrow on purpose, so that they mean the same
# in every version of Unicode.
_WORD_BEGINS = re.compile(r"(?<=\S)(?=[ \n])|(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=[.,;:!?\u3001\u3002\uff0c\uff1b])")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cuts a text into pieces of about `size` characters; joined they are the text again.

    Cuts lie where a word begins, so that the BPE tokens of the pieces are those of the whole text. Only a
    run of 32 * size characters without such a place (a text without spaces) is cut anywhere.
    """
    start, end = 0, len(text)
    while end - start > size:
        cut = _last_cut(text, start, start + size)
        if cut is None:
            found = _WORD_BEGINS.search(text, start + size, min(end, start + 32 * size))
            cut = found.start() if found else min(end, start + 32 * size)
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:]


def _last_cut(text: str, start: int, end: int) -> int | None:
    """The last place in (start, end] where a word begins, looked for in the last half, nearest its end first."""
    for reach in (256, (end - start) // 2):
        places = [match.start() for match in _WORD_BEGINS.finditer(text, max(start + 1, end - reach), end)]
        if places:
            return places[-1]
    return None
