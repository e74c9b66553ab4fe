"""Unicode normalization of a text in blocks, and how a text writes its accents."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

LONGEST = 1 << 22
"""Characters without a boundary after which a text is cut anyway."""
_BOUNDARY = re.compile("[\u0000-\u02ff\u0370-\u0482\u048a-\u0590\u2010-\u2027\u3001-\u3029\u3041-\u3098\u4e00-\u9fff"
                       "\uac00-\ud7a3]")
"""Characters that never compose with what stands before them, so that a text may be cut there."""
_MARKED = re.compile("[^\\W\\d_][\u0300-\u036f]")
_MARKS = re.compile(b"\xcc[\x80-\xbf]|\xcd[\x80-\xaf]")


def nfc(blocks: Iterable[str]) -> Iterator[str]:
    """Yield a document in Unicode's form NFC, which writes an accented letter as one character where there is one."""
    rest = ""
    for block in blocks:
        text = rest + block
        if block.isascii() and len(block) > 1:
            yield unicodedata.normalize("NFC", text[:-1])
            rest = text[-1:]
            continue
        cut = _last_boundary(text, len(rest))
        if cut == 0 and len(text) > LONGEST:
            cut = len(text)
        yield unicodedata.normalize("NFC", text[:cut])
        rest = text[cut:]
    yield unicodedata.normalize("NFC", rest)


def _last_boundary(text: str, first: int) -> int:
    """Return the last place where a text may be cut, at least `first` if the text before has none; 0 if there is none.
    """
    end = len(text)
    while end > first:
        start = max(first, end - 256)
        matches = list(_BOUNDARY.finditer(text, start, end))
        if matches:
            return matches[-1].start()
        end = start
    return 0


def _compositions() -> frozenset[str]:
    """Return the characters that Unicode also writes as a letter and a combining accent (U+0300 to U+036F)."""
    found = set()
    for code in (*range(0xC0, 0x590), *range(0x1E00, 0x2000)):
        mapping = unicodedata.decomposition(chr(code))
        if " " in mapping and "<" not in mapping and 0x300 <= int(mapping.split()[-1], 16) <= 0x36F:
            found.add(chr(code))
    return frozenset(found)


class Accents:
    """A count of the accents of a text that stand apart from their letters, although there is a character for both.

    apart: their number.
    """

    def __init__(self) -> None:
        self.apart, self._last = 0, ""

    def add(self, text: str, raw: bytes) -> None:
        """Count the next block of a text. raw: its UTF-8."""
        if (b"\xcc" in raw or b"\xcd" in raw) and _MARKS.search(raw):  # the first bytes of all combining accents
            pairs = _MARKED.findall(self._last + text)
            self.apart += sum(len(unicodedata.normalize("NFC", pair)) == 1 for pair in pairs)
        self._last = text[-1:]

    def mixed(self, alphabet: str) -> bool:
        """Return True if a text with this alphabet writes accents in both ways."""
        return self.apart > 0 and not _compositions().isdisjoint(alphabet)
