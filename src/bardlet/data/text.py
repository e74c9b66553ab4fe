"""Read one file as documents of clean Unicode: a text file is one document, a .jsonl file has one per line.

Text is UTF-8 whatever the machine's locale. A byte order mark, UTF-16 and Windows line endings are repaired, with a
notice; anything else is an error that names the file and the byte or line.
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
    """Return the suffix, without the compression suffix: .jsonl for a.jsonl.xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


@dataclass(frozen=True)
class Source:
    """One file. label: its name in hashes and messages. part: "both" (to be split), "train" or "val".

    field: the key of a .jsonl line that holds the text. separator: regular expression between documents of a text file.
    """

    path: Path
    label: str
    part: str = "both"
    field: str = "text"
    separator: str | None = None

    @property
    def is_jsonl(self) -> bool:
        """True if each line is a JSON object with the text of a document."""
        return inner_suffix(self.path) == ".jsonl"


Notice = Callable[[Source, str], None]


@contextlib.contextmanager
def open_raw(path: Path, compressed: bool = False) -> Iterator[IO[bytes]]:
    """Open the bytes of a file, decompressed by its suffix unless `compressed`. BardletError if that fails."""
    opener = open if compressed else OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BardletError(f"{path}: the compressed data is damaged ({error}); get the file again") from None
    except PermissionError:
        raise BardletError(f"{path}: permission denied; change its permissions (chmod u+r) or copy it") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror or error}); check the file and the disk") from None


def digest_of(path: Path) -> bytes:
    """Return the sha256 of the bytes of a file, without decompressing it."""
    digest = hashlib.sha256()
    with open_raw(path, compressed=True) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def read_text(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """Yield (location, text) of each document of a text file: one, unless `source` has a separator."""
    with open_raw(source.path) as file:
        raw = _read(file)
    text = _repair(_decode(raw, source, notice), source, notice)
    del raw  # else a large file would be in memory twice while its documents are used
    if source.separator is None:
        yield str(source.path), text
        return
    start = 0
    for number, match in enumerate(re.finditer(source.separator, text), 1):
        yield f"{source.path}, document {number}", text[start : match.start()]
        start = match.end()
    yield f"{source.path}, last document", text[start:]


def _read(file: IO[bytes]) -> bytes:
    """Return all bytes of a file, but stop after a NUL: it is not text, and may decompress to gigabytes of zeros."""
    blocks = [file.read(1 << 24)]
    wide = blocks[0].startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    nul = bytes(8 if wide else 1)  # two characters of UTF-32 can have five zeros in a row
    while blocks[-1] and nul not in blocks[-1]:
        blocks.append(file.read(1 << 24))
    return b"".join(blocks)


def _decode(raw: bytes, source: Source, notice: Notice) -> str:
    """Decode a whole file as UTF-8, or as its byte order mark says. A NUL means that it is not text."""
    for mark, encoding, name in (
        (b"\xff\xfe\x00\x00", "utf-32", "UTF-32"),
        (b"\x00\x00\xfe\xff", "utf-32", "UTF-32"),
        (b"\xff\xfe", "utf-16", "UTF-16"),
        (b"\xfe\xff", "utf-16", "UTF-16"),
    ):
        if raw.startswith(mark):
            notice(source, f"is {name}, not UTF-8; reading it as {name}")
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise BardletError(
                    f"{source.path}: not valid {name} at byte {error.start} ({error.reason}); save it as UTF-8"
                ) from None
            if (nul := text.find("\0")) >= 0:
                raise BardletError(f"{source.path}: NUL at character {nul}, so it is not text; remove the NUL")
            return text
    if (nul := raw.find(b"\0")) >= 0:
        raise BardletError(
            f"{source.path}: NUL at byte {nul} (line {raw.count(10, 0, nul) + 1}), so it is binary, not text; "
            "leave the file out, or save it as UTF-8 text"
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        notice(source, "starts with a byte order mark; ignoring it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * raw.startswith(b"\xef\xbb\xbf")
        raise _not_utf8(source, offset, raw.count(10, 0, offset) + 1, raw[offset]) from None


def _not_utf8(source: Source, offset: int, line: int, byte: int) -> BardletError:
    return BardletError(
        f"{source.path}: not valid UTF-8 at byte {offset} (line {line}): 0x{byte:02X}; "
        "save the file as UTF-8, for example with iconv -f LATIN1 -t UTF-8"
    )


def _repair(text: str, source: Source, notice: Notice) -> str:
    if "\r\n" in text:
        notice(source, "has Windows line endings (CR LF); reading them as LF")
        text = text.replace("\r\n", "\n")
    return text


def decoded_lines(file: IO[bytes], name: str) -> Iterator[str]:
    """Yield the lines of an open file as they arrive, without line endings and surrounding white space.

    BardletError, with line and byte, if it is not UTF-8 text.
    """
    offset, source = 0, Source(Path(name), name)
    for number, line in enumerate(file, 1):
        text = line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(source, offset + error.start, number, text[error.start]) from None
        if "\0" in decoded:
            raise BardletError(f"{name}: NUL in line {number}, so it is binary, not text; pipe in lines of text")
        offset += len(line)
        yield decoded.strip()


def read_jsonl(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """Yield (location, text) of each line of a .jsonl file, with one line in memory at a time."""
    offset = 0
    with open_raw(source.path) as file:
        lines: Iterator[bytes] = iter(file)
        if file.peek(4)[:2] in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
            lines = io.BytesIO(_decode(file.read(), source, notice).encode())
        for number, line in enumerate(lines, 1):
            location = f"{source.path}, line {number}"
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                notice(source, "starts with a byte order mark; ignoring it")
                line, offset = line[3:], 3
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(source, offset + error.start, number, line[error.start]) from None
            offset += len(line)
            if decoded.strip():
                text = _repair(_text_of_line(decoded, location, source.field), source, notice)
                del line, decoded
                yield location, text


def _text_of_line(line: str, location: str, key: str) -> str:
    """Return the text of one JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: JSON's own, or a number of 5,000 digits
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = " (NUL: this is binary)" if "\0" in line else ""
        raise BardletError(
            f"{location}: is not JSON{column}{hint}; write one object per line, or rename the file to .txt"
        ) from None
    if not isinstance(value, dict):
        raise BardletError(
            f'{location}: is not an object like {{"{key}": "..."}}; write one per line, or rename the file to .txt'
        )
    if key not in value:
        strings = [k for k, v in value.items() if isinstance(v, str)]
        remedy = f"choose one with --field: {', '.join(strings)}" if strings else "no other field has text; add it"
        raise BardletError(f'{location}: has no field "{key}"; {remedy}')
    text = value[key]
    if not isinstance(text, str):
        raise BardletError(f'{location}: "{key}" is {type(text).__name__}, not text; choose another field with --field')
    if "\\ud" in line or "\\uD" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BardletError(
                f'{location}: character {error.start} of "{key}" is half of a surrogate pair; write it as UTF-8'
            ) from None
    return text
