"""Text files: what a source is, and its bytes, decompressed and hashed.

data/blocks.py decodes the bytes and splits them into documents.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import shlex
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from bardlet.data import formats
from bardlet.errors import BardletError

MIN_TO_SPLIT = 20
"""With at least this many documents, pairs or records, whole ones are held out."""
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex")


def _open_zst(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise BardletError(f"{path}: reading .zst needs zstandard; install it with: pip install 'bardlet[documents]', "
                           f"or decompress the file: zstd -d {shlex.quote(str(path))}") from None
    return cast(IO[bytes], _Zstd(file, path, zstandard))


class _Zstd(io.RawIOBase):
    """The bytes of a Zstandard file, frame by frame; EOFError if the last one is cut.

    zstandard's own stream_reader takes a cut file for a shorter one.
    """

    def __init__(self, file: IO[bytes], path: Path, zstandard: Any) -> None:
        self.file, self.path, self.library = file, path, zstandard
        self.frame: Any = None  # between frames: None
        self.rest, self.content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            block = self.rest or self.file.read(1 << 10)  # 1 kB holds up to 32 MB
            if not block and self.frame is not None:
                raise EOFError("the file ends inside a frame")
            if not block:
                return 0
            self.frame, self.rest = self.frame or self.library.ZstdDecompressor().decompressobj(), b""
            try:
                self.content = memoryview(self.frame.decompress(block))
            except self.library.ZstdError as error:
                raise _damaged(self.path, error) from None
            if self.frame.eof:
                self.frame, self.rest = None, self.frame.unused_data
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count


OPENERS: dict[str, Callable[[IO[bytes], Path], IO[bytes]]] = {
    ".gz": lambda file, _: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    ".xz": lambda file, _: lzma.LZMAFile(file),  # noqa: SIM115 (the caller closes it)
    ".bz2": lambda file, _: bz2.BZ2File(file), ".zst": _open_zst}


def inner_suffix(path: Path) -> str:
    """Return the suffix, without the compression suffix: .jsonl for a.jsonl.xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


@dataclass(frozen=True)
class Source:
    """One file. label: its name in hashes and messages. part: "both" (to be split), "train" or "val".

    field: the field of a row that holds the text. separator: regular expression between documents of a text file.
    shuffled: read the documents of a text file in an order that depends on their contents only.
    in_folder: a file that was not named, only its folder. in_pattern: nor was this one, which a pattern matched.
    """

    path: Path
    label: str
    part: str = "both"
    field: str = "text"
    separator: str | None = None
    shuffled: bool = False
    in_folder: bool = False
    in_pattern: bool = False

    @property
    def convert_in_place(self) -> bool:
        """True if a converted file must replace this one, which the same command would read again."""
        return self.in_folder or self.in_pattern


Notice = Callable[[Source, str], None]


MAX_RATIO, FREE_BYTES = 250, 1 << 26
"""Compressed data may hold this many times its size; the ratio is taken after each stretch of so many bytes."""
READ_AHEAD = 1 << 17
"""Bytes of a compressed file that a decompressor may have read, and not yet decompressed."""
AHEAD, BLOCKS = 1 << 18, 8
"""Bytes of a block, and blocks, that a thread decompresses in advance: on a busy machine it often waits for a core."""


class _Bounded(io.RawIOBase):
    """The bytes of a decompressed file, as long as they are not absurdly many for their compressed data.

    Each stretch is measured by itself, so that a bomb behind megabytes of text goes off as early as one without. A
    thread decompresses the next bytes while the last ones are in use.
    """

    def __init__(self, packed: IO[bytes], file: IO[bytes], path: Path) -> None:
        self.packed, self.file, self.path = packed, file, path
        self.count = self.total = self.start = 0  # bytes of this stretch and of all; where this one starts in the file
        self.block = memoryview(b"")
        self.thread = ThreadPoolExecutor(1)
        self.blocks = deque(self.thread.submit(self._read) for _ in range(BLOCKS))

    def _read(self) -> tuple[bytes, int]:
        """Return the next bytes, and the place in the file behind the compressed data that was read for them."""
        return self.packed.read(AHEAD), self.file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.block:
            block, end = self.blocks.popleft().result()
            self._measure(len(block), end)
            self.block = memoryview(block)
            self.blocks.append(self.thread.submit(self._read))
        size = min(len(buffer), len(self.block))
        buffer[:size] = self.block[:size]
        self.block = self.block[size:]
        return size

    def _measure(self, size: int, end: int) -> None:
        """Raise BardletError if the bytes so far, or those of this stretch, are too many for the data up to `end`."""
        self.count += size
        if self.count > FREE_BYTES:
            self.total += self.count
            if self.total > MAX_RATIO * end or self.count > MAX_RATIO * (end - self.start + READ_AHEAD):
                raise BardletError(f"{self.path}: holds more than {MAX_RATIO} times its size, which no text does; if "
                                   "it is what you want, decompress it first")
            self.count, self.start = 0, end

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        super().close()


@contextlib.contextmanager
def open_raw(path: Path, compressed: bool = False) -> Iterator[IO[bytes]]:
    """Open the bytes of a file, decompressed by its suffix unless `compressed`. BardletError if that fails."""
    with _errors_of(path), open(path, "rb") as file:
        if compressed:
            yield file
        else:
            with _decompressed(file, path) as content:
                yield content


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Raise BardletError, with the file and a remedy, for what goes wrong in reading it."""
    try:
        yield
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _damaged(path, error) from None
    except PermissionError:
        raise BardletError(f"{path}: permission denied; change its permissions (chmod u+r) or copy it") from None
    except OSError as error:
        if error.errno is None and path.suffix.lower() in OPENERS:  # as bz2 reports bad data
            raise _damaged(path, error) from None
        raise BardletError(f"{path}: cannot be read ({error.strerror or error}); check the file and the disk") from None


def _damaged(path: Path, error: Exception) -> BardletError:
    return BardletError(f"{path}: the compressed data is damaged ({error}); get the file again")


@contextlib.contextmanager
def _decompressed(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """Open the content of an open file, decompressed by the suffix of its name."""
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        yield file
        return
    with opener(file, path) as packed, io.BufferedReader(_Bounded(packed, file, path), 1 << 16) as content:
        yield content


def inspect(path: Path) -> tuple[bytes, bytes]:
    """Return (first 256 kB of the content, sha256 of the bytes of the file without decompressing), in one opening."""
    digest = hashlib.sha256()
    with _errors_of(path), open(path, "rb") as file:
        with _decompressed(file, path) as content:
            beginning = content.read(1 << 18)
        file.seek(0)
        while block := file.read(1 << 20):
            digest.update(block)
    return beginning, digest.digest()


def digest_of(path: Path) -> bytes:
    """Return the sha256 of the bytes of a file, without decompressing it."""
    digest = hashlib.sha256()
    with open_raw(path, compressed=True) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def not_utf8(source: Source, offset: int, line: int, raw: bytes, start: int) -> BardletError:
    """Return the error for a byte that is not UTF-8, with the encoding of the text and the command that converts it.

    offset: of the byte in the file, for the message; start: of the byte in `raw`, a part of the file.
    """
    lines = raw[max(0, raw.rfind(b"\n", 0, start)) :]  # a sample from the first line with such a byte
    advice = formats.conversion(lines, source.path, source.convert_in_place)
    return BardletError(f"{source.path}: not valid UTF-8 at byte {offset} (line {line}): 0x{raw[start]:02X}; {advice}")


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
