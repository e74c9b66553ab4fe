"""Read a text file as documents of clean Unicode: one document, or several between separators.

Text is UTF-8 whatever the machine's locale. A byte order mark, UTF-16 and Windows line endings are repaired, with a
notice; anything else is an error that names the file and the byte or line.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bardlet.data import formats
from bardlet.errors import BardletError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex")


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise BardletError(f"{path}: reading .zst needs zstandard; install it with: pip install 'bardlet[documents]', "
                           f"or decompress the file: zstd -d {shlex.quote(str(path))}") from None
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, mode), closefd=True))


OPENERS: dict[str, Callable[..., IO[bytes]]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zst}  # type: ignore[dict-item]


def inner_suffix(path: Path) -> str:
    """Return the suffix, without the compression suffix: .jsonl for a.jsonl.xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


@dataclass(frozen=True)
class Source:
    """One file. label: its name in hashes and messages. part: "both" (to be split), "train" or "val".

    field: the field of a row that holds the text. separator: regular expression between documents of a text file.
    shuffled: read the documents of a text file in an order that depends on their contents only.
    """

    path: Path
    label: str
    part: str = "both"
    field: str = "text"
    separator: str | None = None
    shuffled: bool = False

C1_CONTROLS = [chr(code) for code in range(0x80, 0xA0) if code != 0x85]
"""Control characters that no text uses; U+0085 is a line break of some systems."""

Notice = Callable[[Source, str], None]


MAX_RATIO, FREE_BYTES = 250, 1 << 26
"""A compressed file may hold this many times its size; the ratio counts only beyond this many bytes."""


class _Bounded(io.RawIOBase):
    """The bytes of a decompressed file, as long as they are not absurdly many for the size of the compressed one."""

    def __init__(self, packed: IO[bytes], path: Path) -> None:
        self.packed, self.path, self.count = packed, path, 0
        self.limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.packed.read(len(buffer))
        buffer[: len(block)] = block
        self.count += len(block)
        if self.count > self.limit:
            raise BardletError(f"{self.path}: holds more than {MAX_RATIO} times its size, which no text does; if it is "
                               "what you want, decompress it first")
        return len(block)


@contextlib.contextmanager
def open_raw(path: Path, compressed: bool = False) -> Iterator[IO[bytes]]:
    """Open the bytes of a file, decompressed by its suffix unless `compressed`. BardletError if that fails."""
    opener = None if compressed else OPENERS.get(path.suffix.lower())
    try:
        if opener is None:
            with open(path, "rb") as file:
                yield file
        else:
            with opener(path, "rb") as packed, io.BufferedReader(_Bounded(packed, path), 1 << 16) as file:
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
    text = repair(decode(raw, source, notice), source, notice)
    _note_oddities(text, source, notice)
    del raw  # else a large file would be in memory twice while its documents are used
    if source.separator is None:
        yield str(source.path), text
        return
    documents = _documents(text, source)
    if source.shuffled:
        documents = iter(sorted(documents, key=lambda document: hashlib.sha256(document[1].encode()).digest()))
    yield from documents


def _documents(text: str, source: Source) -> Iterator[tuple[str, str]]:
    """Yield (location, text) of the documents between the separators of a text."""
    start = 0
    for number, match in enumerate(re.finditer(str(source.separator), text), 1):
        yield f"{source.path}, document {number}", text[start : match.start()]
        start = match.end()
    yield f"{source.path}, last document", text[start:]


def _note_oddities(text: str, source: Source, notice: Notice) -> None:
    """Report what is probably not meant to be learned: HTML tags, and control characters of a wrong conversion."""
    if formats.is_html(text):
        plain = shlex.quote(f"{source.path.stem}.txt")
        notice(source, f"is HTML, and its tags are part of the text; to leave them out: "
                       f"pandoc {shlex.quote(str(source.path))} -t plain -o {plain}")
    if not text.isascii() and (controls := sum(map(text.count, C1_CONTROLS))):
        notice(source, f"has {controls:,} control characters between U+0080 and U+009F, probably because it was "
                       "converted from the wrong encoding; convert the original again, for example from CP1252")


def _read(file: IO[bytes]) -> bytes:
    """Return all bytes of a file, but stop after a NUL: it is not text, and may decompress to gigabytes of zeros."""
    blocks = [file.read(1 << 24)]
    wide = blocks[0].startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    nul = bytes(8 if wide else 1)  # two characters of UTF-32 can have five zeros in a row
    while blocks[-1] and nul not in blocks[-1]:
        blocks.append(file.read(1 << 24))
    return b"".join(blocks)


def decode(raw: bytes, source: Source, notice: Notice) -> str:
    """Decode a whole file as UTF-8, or as its byte order mark says.

    BardletError for another encoding, and for a file that is not text.
    """
    if sentence := formats.identify(raw[:4096], source.path):
        raise BardletError(f"{source.path}: {sentence}")
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
        raise not_utf8(source, offset, raw.count(10, 0, offset) + 1, raw, offset) from None


def not_utf8(source: Source, offset: int, line: int, raw: bytes, start: int) -> BardletError:
    """Return the error for a byte that is not UTF-8, with the encoding of the text and the command that converts it.

    offset: of the byte in the file, for the message; start: of the byte in `raw`, a part of the file.
    """
    lines = raw[max(0, raw.rfind(b"\n", 0, start)) :]  # a sample from the first line with such a byte
    advice = formats.conversion(lines, source.path)
    return BardletError(f"{source.path}: not valid UTF-8 at byte {offset} (line {line}): 0x{raw[start]:02X}; {advice}")


def repair(text: str, source: Source, notice: Notice) -> str:
    """Return a text with LF line endings, with a notice if it had others."""
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
            raise not_utf8(source, offset + error.start, number, text, error.start) from None
        if "\0" in decoded:
            raise BardletError(f"{name}: NUL in line {number}, so it is binary, not text; pipe in lines of text")
        offset += len(line)
        yield decoded.strip()
