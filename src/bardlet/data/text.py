"""One file as documents of clean Unicode: a text file is one document, a .jsonl file has one a line.

Everything is read as UTF-8 whatever the machine's locale. What can be mended is mended and said (a byte order mark,
UTF-16, Windows line ends); what cannot is an error with its file and byte, or line.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bardlet.errors import BardletError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]


def inner_suffix(path: Path) -> str:
    """The suffix without that of the compression: .jsonl for a.jsonl.xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


@dataclass(frozen=True)
class Source:
    """One file. label: its name in hashes and messages; part: "both" (to be split), "train" or "val"."""

    path: Path
    label: str
    part: str = "both"
    field: str = "text"
    between: str | None = None

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object with the text of a document."""
        return inner_suffix(self.path) == ".jsonl"


Notice = Callable[[Source, str], None]


@contextlib.contextmanager
def open_raw(path: Path, compressed: bool = False) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix unless `compressed`; every failure is one line."""
    opener = open if compressed else OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BardletError(f"{path}: its compression is damaged ({error}): get the file again") from None
    except PermissionError:
        raise BardletError(f"{path}: may not be read: change its permissions or copy it (chmod u+r)") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror or error})") from None


def digest_of(path: Path) -> bytes:
    """sha256 of the bytes of a file as they lie on the disk."""
    digest = hashlib.sha256()
    with open_raw(path, compressed=True) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def read_text(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """(place, text) of each document of a text file: one, unless `between` says what separates them."""
    with open_raw(source.path) as file:
        raw = _read(file)
    text = _mend(_decode(raw, source, notice), source, notice)
    del raw  # a big file would lie in memory twice while its documents are used
    if source.between is None:
        yield str(source.path), text
        return
    start = 0
    for number, match in enumerate(re.finditer(source.between, text), 1):
        yield f"{source.path}, document {number}", text[start : match.start()]
        start = match.end()
    yield f"{source.path}, last document", text[start:]


def _read(file: IO[bytes]) -> bytes:
    """All bytes of a file; of one that is no text only up to there: a small file can hold gigabytes of zeros."""
    blocks = [file.read(1 << 24)]
    wide = blocks[0].startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    nul = bytes(8 if wide else 1)  # two characters of UTF-32 can have five zeros in a row
    while blocks[-1] and nul not in blocks[-1]:
        blocks.append(file.read(1 << 24))
    return b"".join(blocks)


def _decode(raw: bytes, source: Source, notice: Notice) -> str:
    """The text of a whole file: UTF-8, or what its byte order mark says. NUL means that it is no text."""
    for mark, encoding, what in (
        (b"\xff\xfe\x00\x00", "utf-32", "UTF-32"),
        (b"\x00\x00\xfe\xff", "utf-32", "UTF-32"),
        (b"\xff\xfe", "utf-16", "UTF-16"),
        (b"\xfe\xff", "utf-16", "UTF-16"),
    ):
        if raw.startswith(mark):
            notice(source, f"is {what}, not UTF-8; read as {what}")
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise BardletError(
                    f"{source.path}: begins as {what} but byte {error.start} is not ({error.reason}): save it as UTF-8"
                ) from None
            if (nul := text.find("\0")) >= 0:
                raise BardletError(f"{source.path}: character {nul} is NUL, so this is no text: take it out")
            return text
    if (nul := raw.find(b"\0")) >= 0:
        raise BardletError(
            f"{source.path}: byte {nul} (line {raw.count(10, 0, nul) + 1}) is NUL, so this is binary, no text: "
            "take the file out, or save it as UTF-8 text"
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        notice(source, "begins with a byte order mark, which was dropped")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * raw.startswith(b"\xef\xbb\xbf")
        raise _not_utf8(source, offset, raw.count(10, 0, offset) + 1, raw[offset]) from None


def _not_utf8(source: Source, offset: int, line: int, byte: int) -> BardletError:
    return BardletError(
        f"{source.path}: byte {offset} (line {line}) is 0x{byte:02X}, which is no UTF-8: "
        "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, say)"
    )


def _mend(text: str, source: Source, notice: Notice) -> str:
    if "\r\n" in text:
        notice(source, "has Windows line ends (CR LF), read as LF")
        text = text.replace("\r\n", "\n")
    return text


def decoded_lines(file: IO[bytes], name: str) -> Iterator[str]:
    """The lines of an open file as they come, without their ends and the white space around them.

    BardletError, with line and byte, for what is no UTF-8 text.
    """
    offset, source = 0, Source(Path(name), name)
    for number, line in enumerate(file, 1):
        text = line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(source, offset + error.start, number, text[error.start]) from None
        if "\0" in decoded:
            raise BardletError(f"{name}: line {number} has a NUL, so this is binary, no text: pipe in lines of text")
        offset += len(line)
        yield decoded.strip()


def read_jsonl(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """(place, text) of each line of a .jsonl file, one line in memory at a time."""
    offset = 0
    with open_raw(source.path) as file:
        lines: Iterator[bytes] = iter(file)
        if file.peek(4)[:2] in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
            lines = io.BytesIO(_decode(file.read(), source, notice).encode())
        for number, line in enumerate(lines, 1):
            place = f"{source.path}, line {number}"
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                notice(source, "begins with a byte order mark, which was dropped")
                line, offset = line[3:], 3
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(source, offset + error.start, number, line[error.start]) from None
            offset += len(line)
            if decoded.strip():
                text = _mend(_text_of_line(decoded, place, source.field), source, notice)
                del line, decoded
                yield place, text


def _text_of_line(line: str, place: str, key: str) -> str:
    """The text of one JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: JSON's own, or a number of 5,000 digits
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = " (NUL: this is binary)" if "\0" in line else ""
        raise BardletError(
            f"{place}: is not JSON{column}{hint}: write one object a line, or rename the file to .txt"
        ) from None
    if not isinstance(value, dict):
        raise BardletError(f'{place}: is not an object like {{"{key}": "..."}}: write one a line, or rename it to .txt')
    if key not in value:
        strings = [k for k, v in value.items() if isinstance(v, str)]
        remedy = f"choose one with --field: {', '.join(strings)}" if strings else "and no field with text at all"
        raise BardletError(f'{place}: has no field "{key}"; {remedy}')
    text = value[key]
    if not isinstance(text, str):
        raise BardletError(f'{place}: "{key}" is {type(text).__name__}, not text: choose another field with --field')
    if "\\ud" in line or "\\uD" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BardletError(
                f'{place}: character {error.start} of "{key}" is half of a surrogate pair: write it as UTF-8'
            ) from None
    return text
