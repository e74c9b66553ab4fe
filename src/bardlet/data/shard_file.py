"""A token shard: a one-dimensional .npy array of ids, 16 or 32 bits each.

It is memory-mapped, so a text may be larger than memory.
"""

from __future__ import annotations

import itertools
import os
import struct
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer
from bardlet.tokenizer.pieces import BATCH, PIECE

Document = TypeVar("Document")

HEADER_V1 = struct.Struct("<8sIIQ32s72x")
"""Shard header of bardlet 0.2: "bardlet", 1, bytes per token, number of tokens, hash of the tokenizer."""


# ------------------------------------------------------------------------------------------- writing


def write_shard(
    path: Path,
    documents: Iterable[tuple[Document, Iterable[str]]],
    tokenizer: Tokenizer,
    separate: bool,
    progress: Callable[[int], None] | None = None,
    locate: Callable[[Document], str] = str,
) -> tuple[int, int, int]:
    """Write documents, each with its text in blocks, as one shard; return its numbers of characters, bytes and tokens.

    Short documents are encoded together, which is several times faster.

    separate: end each document with the separator, if the tokenizer has one. progress: called with the characters done.
    locate: returns file and line of a document, for messages.
    """
    with open(path, "wb") as file:
        header_size = _write_header(file, tokenizer.dtype, 0)
        writer = _Writer(file, tokenizer, tokenizer.eos_id if separate else None, progress or (lambda _: None), locate)
        for document, blocks in documents:
            writer.add(document, iter(blocks))
        writer.write_short()
        file.seek(0)
        if _write_header(file, tokenizer.dtype, writer.tokens) != header_size:  # it is padded so that counts can grow
            raise BardletError(f"{path}: internal error: the header of {writer.tokens:,} tokens has another length")
        file.flush()
        os.fsync(file.fileno())
    return writer.characters, writer.bytes, writer.tokens


class _Writer(Generic[Document]):
    """Writes the ids of documents, and counts."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, separator: int | None, progress: Callable[[int], None],
                 locate: Callable[[Document], str]) -> None:
        self.file, self.tokenizer, self.separator = file, tokenizer, separator
        self.progress, self.locate = progress, locate
        self.characters = self.bytes = self.tokens = 0
        self.short: list[tuple[Document, str]] = []
        self.size = 0  # characters in `short`

    def add(self, document: Document, blocks: Iterator[str]) -> None:
        """Write a document, or put it off if it is short."""
        beginning = list(itertools.islice(blocks, 2))
        if len(beginning) == 1 and len(beginning[0]) <= PIECE:
            self.short.append((document, beginning[0]))
            self.size += len(beginning[0])
            if self.size >= PIECE * BATCH:
                self.write_short()
        else:
            self.write_short()
            self._write_long(document, itertools.chain(beginning, blocks))

    def write_short(self) -> None:
        """Write the short documents that were put off."""
        texts = [text for _, text in self.short]
        try:
            ids = self.tokenizer.encode_documents(texts, self.separator)
        except BardletError:
            for document, text in self.short:  # one of them raises the error with its place
                self._write_long(document, (text,))
            raise
        self._write(ids)
        for text in texts:
            self._count(text)
        self.progress(self.characters)
        self.short, self.size = [], 0

    def _write_long(self, document: Document, blocks: Iterable[str]) -> None:
        if self.separator is not None:
            self._write(np.array(self.tokenizer.prefix_ids, self.tokenizer.dtype))
        try:
            for ids in self.tokenizer.encode_blocks(self._counted(blocks)):
                self._write(ids)
        except BardletError as error:
            raise BardletError(f"{self.locate(document)}: {error}") from None
        if self.separator is not None:
            self._write(np.array([self.separator], self.tokenizer.dtype))

    def _counted(self, blocks: Iterable[str]) -> Iterator[str]:
        for block in blocks:
            yield block
            self._count(block)
            self.progress(self.characters)  # approximate: a part of the block may wait for the next

    def _count(self, text: str) -> None:
        self.characters += len(text)
        self.bytes += _utf8_length(text)

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(ids.tobytes())
        self.tokens += len(ids)


def _utf8_length(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(len(text[i : i + (1 << 20)].encode("utf-8", "surrogatepass")) for i in range(0, len(text), 1 << 20))


def _write_header(file: BinaryIO, dtype: np.dtype[Any], count: int) -> int:
    """Write the header of an array of `count` numbers; return its size."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


# ------------------------------------------------------------------------------------------- reading


def open_shard(path: Path) -> np.ndarray:
    """Return the ids of the shard NAME.npy, or of NAME.bin, version 1: (N,), memory-mapped and read-only.

    Raises:
        BardletError: the file is damaged, or not a shard.
    """
    if not path.exists() and path.with_suffix(".bin").exists():
        return _open_version_1(path.with_suffix(".bin"))
    ids = read_array(path)
    if ids.ndim != 1 or ids.dtype.str not in ("<u2", "<u4"):
        raise BardletError(f"{path}: has no token ids")
    return ids


def read_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file, memory-mapped and read-only. BardletError if the file is not one."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OverflowError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise BardletError(f"{path}: is not a NumPy array ({str(error).splitlines()[0]})") from None
    if not isinstance(array, np.ndarray):  # a zip file of several
        raise BardletError(f"{path}: is not a NumPy array")
    return array


def _open_version_1(path: Path) -> np.ndarray:
    """Return the ids of a shard of bardlet 0.2."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_V1.size)
    if len(head) < HEADER_V1.size:
        raise BardletError(f"{path}: ends in its header")
    magic, version, width, count, _ = HEADER_V1.unpack(head)
    if magic != b"bardlet\0" or version != 1 or width not in (2, 4):
        raise BardletError(f"{path}: is not a shard of bardlet")
    if size != HEADER_V1.size + width * count:
        raise BardletError(f"{path}: has {size} bytes, not {HEADER_V1.size + width * count}")
    return np.memmap(path, f"<u{width}", "r", HEADER_V1.size, (count,)) if count else np.zeros(0, f"<u{width}")
