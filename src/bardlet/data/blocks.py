"""Read a text file in blocks of clean Unicode: one document, or several between separators.

Text is UTF-8 whatever the machine's locale. A byte order mark, UTF-16 and Windows line endings are repaired, with a
notice; anything else is an error that names the file and the byte or line. Memory holds a few blocks of a file,
whatever its size and the size of its documents.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import operator
import re
import shlex
from collections.abc import Iterator
from typing import IO

from bardlet.data import formats
from bardlet.data.scratch import scratch_file
from bardlet.data.text import Notice, Source, not_utf8, open_raw
from bardlet.errors import BardletError

BLOCK = 1 << 20
"""Bytes that are read at once."""
LINE = 1 << 16
"""Bytes of a line, before a byte that is not UTF-8, from which its encoding is identified."""

C1_CONTROLS = re.compile(b"\xc2[\x80-\x84\x86-\x9f]")
"""Control characters that no text uses, in UTF-8; U+0085 is a line break of some systems."""

Located = tuple[str, str]
"""(location, text): a block of a document. Consecutive blocks with the same location are one document."""

BYTE_ORDER_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32-le", "UTF-32"),
    (b"\x00\x00\xfe\xff", "utf-32-be", "UTF-32"),
    (b"\xff\xfe", "utf-16-le", "UTF-16"),
    (b"\xfe\xff", "utf-16-be", "UTF-16"),
    (b"\xef\xbb\xbf", "utf-8", "UTF-8"),
)


def read_text(source: Source, notice: Notice) -> Iterator[Located]:
    """Yield (location, text) of each document of a text file, whole: one, unless `source` has a separator."""
    blocks = read_blocks(source, notice)
    yield from ((location, "".join(text for _, text in group))
                for location, group in itertools.groupby(blocks, operator.itemgetter(0)))


def read_blocks(source: Source, notice: Notice) -> Iterator[Located]:
    """Yield (location, text) of the documents of a text file, in blocks."""
    with open_raw(source.path) as file:
        blocks = _noted(decoded(file, source, notice), source, notice)
        if source.separator is None:
            yield from ((str(source.path), text) for text in itertools.chain(("",), blocks))
        elif source.shuffled:
            yield from _shuffled(_documents(blocks, source))
        else:
            yield from _documents(blocks, source)


# ---------------------------------------------------------------------------------------- decoding


def decoded(file: IO[bytes], source: Source, notice: Notice, newline: bool = True) -> Iterator[str]:
    """Yield the text of an open file in blocks: UTF-8, or as its byte order mark says.

    newline: read CR LF as LF, with a notice.

    Raises:
        BardletError: another encoding, or a file that is not text.
    """
    raw = file.read(BLOCK)
    if sentence := formats.identify(raw[:4096], source.path):
        raise BardletError(f"{source.path}: {sentence}")
    mark, encoding, name = next((each for each in BYTE_ORDER_MARKS if raw.startswith(each[0])), (b"", "utf-8", "UTF-8"))
    if name != "UTF-8":
        notice(source, f"is {name}, not UTF-8; reading it as {name}")
    elif mark:
        notice(source, "starts with a byte order mark; ignoring it")
    elif sentence := formats.without_mark(raw[:4096], source.path, source.convert_in_place):
        raise BardletError(f"{source.path}: {sentence}")
    decoder = _Utf8(file, source, len(mark)) if name == "UTF-8" else _Wide(encoding, source, name, len(mark))
    blocks = _decoded(file, raw[len(mark):], decoder)
    yield from _with_line_feeds(blocks, source, notice) if newline else blocks


def _decoded(file: IO[bytes], raw: bytes, decoder: _Utf8 | _Wide) -> Iterator[str]:
    yield decoder.decode(raw, final=False)
    while raw := file.read(BLOCK):
        yield decoder.decode(raw, final=False)
    yield decoder.decode(b"", final=True)


class _Utf8:
    """An incremental decoder that describes the first byte that is no text."""

    def __init__(self, file: IO[bytes], source: Source, offset: int) -> None:
        """offset: of the next byte in the file."""
        self.file, self.source, self.offset = file, source, offset
        self.newlines, self.line = 0, b""
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def decode(self, raw: bytes, final: bool) -> str:
        """Return the text of the next bytes; the bytes of an incomplete character wait for the next call."""
        if (nul := raw.find(b"\0")) >= 0:
            line = self.newlines + raw.count(10, 0, nul) + 1
            raise BardletError(f"{self.source.path}: NUL at byte {self.offset + nul} (line {line}), so it is binary, "
                               "not text; leave the file out, or save it as UTF-8 text")
        waiting = self.decoder.getstate()[0]
        try:
            text = self.decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            known, start = self.line + raw, len(self.line) - len(waiting) + error.start
            offset = self.offset - len(waiting) + error.start
            line = self.newlines + known.count(10, len(self.line), max(start, len(self.line))) + 1
            raise not_utf8(self.source, offset, line, known + self.file.read(formats.SAMPLE), start) from None
        self.offset += len(raw)
        self.newlines += raw.count(10)
        self.line = (self.line if raw.rfind(10) < 0 else b"")[-LINE:] + raw[max(0, raw.rfind(10)):][-LINE:]
        return text


class _Wide:
    """An incremental decoder of UTF-16 and UTF-32 that describes the first error."""

    def __init__(self, encoding: str, source: Source, name: str, offset: int) -> None:
        """offset: of the next byte in the file."""
        self.source, self.name, self.offset, self.characters = source, name, offset, 0
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def decode(self, raw: bytes, final: bool) -> str:
        """Return the text of the next bytes; the bytes of an incomplete character wait for the next call."""
        waiting = len(self.decoder.getstate()[0])
        try:
            text = self.decoder.decode(raw, final)
        except UnicodeDecodeError as error:
            offset = self.offset - waiting + error.start
            raise BardletError(f"{self.source.path}: not valid {self.name} at byte {offset} ({error.reason}); "
                               "save it as UTF-8") from None
        if (nul := text.find("\0")) >= 0:
            raise BardletError(f"{self.source.path}: NUL at character {self.characters + nul}, so it is not text; "
                               "remove the NUL")
        self.offset += len(raw)
        self.characters += len(text)
        return text


def _with_line_feeds(blocks: Iterator[str], source: Source, notice: Notice) -> Iterator[str]:
    """Yield a text with LF in place of CR LF, with a notice if it has any."""
    windows, rest = False, ""
    for block in blocks:
        text = rest + block
        rest = "\r" * text.endswith("\r")  # its LF may be in the next block
        text = text[:-1] if rest else text
        if "\r\n" in text:
            windows, text = True, text.replace("\r\n", "\n")
        yield text
    yield rest
    if windows:
        notice(source, "has Windows line endings (CR LF); reading them as LF")


def repair(text: str, source: Source, notice: Notice) -> str:
    """Return a text with LF line endings, with a notice if it had others."""
    return "".join(_with_line_feeds(iter((text,)), source, notice)) if "\r" in text else text


def _noted(blocks: Iterator[str], source: Source, notice: Notice) -> Iterator[str]:
    """Yield the blocks of a text. Report what is probably not meant to be learned: HTML tags, and control characters
    of a wrong conversion."""
    beginning, controls, wrong = "", 0, ""
    for block in blocks:
        if len(beginning) < 1000:
            beginning += block[:1000 - len(beginning)]
        if not block.isascii() and (found := C1_CONTROLS.findall(block.encode("utf-8", "surrogatepass"))):
            controls, wrong = controls + len(found), wrong or block[:formats.SAMPLE]
        if block:
            yield block
    if formats.is_html(beginning):
        plain = shlex.quote(f"{source.path.stem}.txt")
        notice(source, f"is HTML, and its tags are part of the text; to leave them out: "
                       f"pandoc {shlex.quote(str(source.path))} -t plain -o {plain}")
    if controls:
        notice(source, f"has {controls:,} control characters between U+0080 and U+009F, probably because it was "
                       f"converted from the wrong encoding; convert the original again, from {formats.origin(wrong)}")


# --------------------------------------------------------------------------------------- documents


def _documents(blocks: Iterator[str], source: Source) -> Iterator[Located]:
    """Yield (location, block) of the documents between the separators of a text."""
    separator = re.compile(str(source.separator))
    longest = len(separator.pattern) + 1  # no shorter than any match; and a character that a lookbehind sees
    buffer, start, number = "", 0, 1  # start: of the current document, or of what is left of it

    def split(final: bool) -> Iterator[Located]:
        nonlocal start, number
        for match in separator.finditer(buffer, start):
            if match.end() + longest > len(buffer) and not final:
                break  # with the next block it may be longer, or none
            yield f"{source.path}, document {number}", buffer[start:match.start()]
            number, start = number + 1, match.end()

    for block in blocks:
        buffer += block
        yield from split(final=False)
        whole = max(start, len(buffer) - 2 * longest)  # a separator that began before would have been complete
        yield f"{source.path}, document {number}", buffer[start:whole]
        kept = max(0, whole - 1)
        buffer, start = buffer[kept:], whole - kept
    yield from split(final=True)
    yield f"{source.path}, document {number}", buffer[start:]


BUCKETS, IN_MEMORY = 1024, 1 << 24
"""Parts that the lines of a list are distributed to, by hash, and the bytes of lines that are sorted without a file."""


def _shuffled(documents: Iterator[Located]) -> Iterator[Located]:
    """Yield documents without line breaks in the order of the sha256 of their text.

    Longer lists are sorted on disk: a temporary file holds the lines, and memory one bucket of them.
    """
    pending: list[list[bytes]] = [[] for _ in range(BUCKETS)]
    extents: list[list[tuple[int, int]]] = [[] for _ in range(BUCKETS)]
    held = 0
    with scratch_file(in_memory=1) as file:
        for location, group in itertools.groupby(documents, operator.itemgetter(0)):
            line = "".join(text for _, text in group).encode()
            bucket = int.from_bytes(hashlib.sha256(line).digest()[:2], "big") * BUCKETS >> 16
            pending[bucket].append(location.rpartition(" ")[2].encode() + b"\t" + line)
            held += len(line) + 100
            if held > IN_MEMORY:
                for lines, parts in zip(pending, extents, strict=True):
                    if lines:
                        parts.append((file.tell(), file.write(b"\n".join(lines))))
                        lines.clear()
                held = 0
        prefix = location.rpartition(" ")[0]
        for lines, parts in zip(pending, extents, strict=True):
            yield from ((f"{prefix} {number}", text) for number, text in _sorted(_contents(file, parts) + lines))


def _contents(file: IO[bytes], extents: list[tuple[int, int]]) -> list[bytes]:
    lines: list[bytes] = []
    for start, size in extents:
        file.seek(start)
        lines += file.read(size).split(b"\n")
    return lines


def _sorted(lines: list[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (number, text) of lines of the form NUMBER, tab, TEXT, in the order of the sha256 of the text."""
    pairs = [line.split(b"\t", 1) for line in lines]
    for number, text in sorted(pairs, key=lambda pair: hashlib.sha256(pair[1]).digest()):
        yield number.decode(), text.decode()
