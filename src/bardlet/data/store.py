"""The documents of a corpus as clean UTF-8, in one temporary file: read from the sources once, then in blocks.

A small text stays in memory. In the file each document ends with a byte that UTF-8 never has, so memory needs no index
of the documents.
"""

from __future__ import annotations

import codecs
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from bardlet.data import normalization
from bardlet.data.normalization import Accents
from bardlet.data.scratch import scratch_file, write_errors
from bardlet.data.text import MIN_TO_SPLIT, Source
from bardlet.tokenizer import code_points

END = b"\xff"
"""Ends each document."""
BLOCK = 1 << 20
"""Bytes that are read at once."""
IN_MEMORY = 1 << 24
"""Bytes of a text that is kept in memory instead of a file."""

Read = Callable[[Source], Iterable[tuple[str, str]]]


class TextStore:
    """The documents of some sources, in order, without empty ones.

    documents: number of documents. splits_documents: True if there are MIN_TO_SPLIT documents or more of which some are
    to be held out. alphabet: all characters, in order of code points. accents: how the text writes them.
    """

    def __init__(self, sources: Iterable[Source], read: Read, normalize: str | None = None) -> None:
        """read: yields (location, text) of the documents of a source, in blocks. normalize: nfc, or None."""
        self.file: IO[bytes] = scratch_file(IN_MEMORY)
        self.documents = 0
        self.accents = Accents()
        self._parts: list[tuple[str, int]] = []  # part and number of documents of each source
        self._lengths: list[int] = []  # characters of the first documents to be split
        self._seen = np.zeros(0x110000, bool)
        self._texts: list[str] = []  # not yet in the file, which takes many short documents at once
        self._raw: list[bytes] = []  # the same as UTF-8, with the ends of documents
        self._pending = 0  # characters of these
        for source in sources:
            count = 0
            for _, group in itertools.groupby(read(source), operator.itemgetter(0)):
                blocks: Iterable[str] = (text for _, text in group)
                characters = self._add(normalization.nfc(blocks) if normalize == "nfc" else blocks)
                count += characters > 0
                if characters and source.part == "both" and len(self._lengths) < MIN_TO_SPLIT:
                    self._lengths.append(characters)
            self._parts.append((source.part, count))
            self.documents += count
        self._write()
        self.splits_documents = len(self._lengths) == MIN_TO_SPLIT
        self.alphabet = "".join(map(chr, np.flatnonzero(self._seen)))

    def close(self) -> None:
        """Delete the temporary file."""
        self.file.close()

    def _add(self, blocks: Iterable[str]) -> int:
        """Append a document and return its number of characters; if there are none, append nothing."""
        characters = 0
        for text in blocks:
            if text:
                characters += len(text)
                self._texts.append(text)
                self._raw.append(text.encode("utf-8", "surrogatepass"))
                self._pending += len(text)
                if self._pending >= BLOCK:
                    self._write()
        if characters:
            self._raw.append(END)
        return characters

    def _write(self) -> None:
        """Append the pending documents to the file, and take note of their characters and accents."""
        text, raw = "".join(self._texts), b"".join(self._raw)
        self._seen[np.frombuffer(text.encode(), np.uint8) if text.isascii() else code_points(text)] = True
        self.accents.add(text, raw)
        with write_errors():
            self.file.write(raw)
        self._texts, self._raw, self._pending = [], [], 0

    @property
    def has_letters(self) -> bool:
        """True if a character is not white space."""
        return bool(self.alphabet.strip())

    @property
    def several_train(self) -> bool:
        """True if the training split has more than one document."""
        split = sum(count for part, count in self._parts if part == "both")
        kept = split - split // 10 if self.splits_documents else sum(length > 1 for length in self._lengths)
        return kept + sum(count for part, count in self._parts if part == "train") > 1

    def blocks(self, part: str) -> Iterator[tuple[int, str]]:
        """Yield (number of the document, text) of the documents of a split: "all", "train" or "val".

        A long document comes in several blocks, all with its number.
        """
        parts, current, index = iter(self._parts), -1, -1
        of, left = "", 0  # part of the source, and its documents still to come
        for number, text in self._read():
            if number != current:
                current, position = number, 0
                while not left:
                    of, left = next(parts)
                left -= 1
                index += of == "both"
                kept = self._kept(part, of, index)
            block = text[max(0, kept.start - position):max(0, kept.stop - position)]
            position += len(text)
            if block:
                yield number, block

    def _kept(self, part: str, of: str, index: int) -> range:
        """Return the characters that a split has of a document. index: among the documents to be split."""
        whole = range(sys.maxsize)
        if part in ("all", of):
            return whole
        if of != "both":
            return range(0)
        if self.splits_documents:
            return whole if (index % 10 == 9) == (part == "val") else range(0)
        cut = int(0.9 * self._lengths[index])
        return range(cut) if part == "train" else range(cut, sys.maxsize)

    def _read(self) -> Iterator[tuple[int, str]]:
        """Yield (number of the document, text) of all documents, in blocks."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        number = start = 0
        while True:
            self.file.seek(start)  # another reader may have moved it
            raw = self.file.read(BLOCK)
            if not raw:
                return
            start += len(raw)
            *ends, rest = raw.split(END)
            for end in ends:
                yield number, decoder.decode(end, final=True)
                number += 1
            if rest:
                yield number, decoder.decode(rest)
