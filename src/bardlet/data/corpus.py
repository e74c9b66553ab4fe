"""Named corpora, files, folders and globs, read as documents of clean Unicode.

A corpus is a list of sources in reading order. This module finds the files and names them. data/blocks.py and
data/rows.py read a single file; data/store.py keeps the documents and splits them into training and validation.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import logging
import operator
import os
import re
import shlex
import stat
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape, glob
from pathlib import Path

from bardlet import console
from bardlet.data import rows, separators
from bardlet.data.blocks import read_blocks
from bardlet.data.named import DEFAULT, EMBEDDED, NAMED, Progress, did_you_mean, get, python_docs
from bardlet.data.store import TextStore
from bardlet.data.text import OPENERS, TEXT_SUFFIXES, Source, digest_of, inner_suffix, inspect
from bardlet.errors import BardletError, quoted

log = logging.getLogger("bardlet")

WALKED = (*TEXT_SUFFIXES, ".jsonl", ".ndjson")
"""Suffixes of the files that are read from a folder; other files must be named."""
NO_TEXT = (".docx", ".doc", ".odt", ".pdf", ".epub", ".rtf", ".zip", ".png", ".jpg", ".jpeg", ".gif", ".safetensors")
"""Suffixes of files that are not text; bardlet names the program that converts the documents among them."""


def dev_split_start(count: int) -> int:
    """Return the start of the development split, the last tenth of `count` training tokens, pairs or records."""
    return int(0.9 * count)


# ------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Documents from files. field: the key of a .jsonl line that holds the text. normalize: nfc, or None.

    Each file is opened once to be named and hashed, and once more to read its documents, unless tokens are cached.
    """

    name: str
    sources: tuple[Source, ...]
    field: str = "text"
    normalize: str | None = None
    digests: dict[Path, bytes] = dataclasses.field(default_factory=dict, repr=False)
    """sha256 of the files that are hashed already."""
    title: str = ""
    """The names of the files or folders, for progress."""
    notices: dict[str, None] = dataclasses.field(default_factory=dict, repr=False)
    """Repairs and oddities of the files, as they were logged."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in reading order; none for the embedded corpus."""
        return tuple(source.path for source in self.sources)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the labels, parts, fields and raw bytes of the files, wherever the files are."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(repr((source.label, source.part, source.field, source.separator)).encode())
            digest.update(b"shuffled" * source.shuffled)
            digest.update(self.digests.get(source.path) or digest_of(source.path))
        if not self.sources:
            digest.update(python_docs().encode())
        if self.normalize:
            digest.update(self.normalize.encode())
        return digest.hexdigest()

    @cached_property
    def store(self) -> TextStore:
        """The documents, read from the files and normalized. BardletError if there is no text in them."""
        embedded = (Source(Path(self.name), self.name),)
        store = TextStore(self.sources or embedded, self._read, self.normalize)
        if not store.has_letters:
            names = ", ".join(str(source.path) for source in self.sources[:3])
            more = f" and {len(self.sources) - 3:,} more" if len(self.sources) > 3 else ""
            blank = ", only white space" if store.documents else ""
            raise BardletError(f"{names}{more}: has no text{blank}; name a file that has some")
        if store.accents.mixed(store.alphabet) and not self.normalize:
            self.announce(f"{self.name}: writes accents in two ways: {store.accents.apart:,} stand apart from their "
                          "letters (decomposed), others do not, so that one word has two spellings; to write all "
                          "alike: --normalize nfc")
        return store

    def release(self) -> None:
        """Delete the temporary copy of the documents; the next use reads the files again."""
        if (store := self.__dict__.pop("store", None)) is not None:
            store.close()

    @property
    def needs_separator(self) -> bool:
        """True if the training split has more than one document."""
        return self.store.several_train

    @property
    def count(self) -> int:
        """Number of documents."""
        return self.store.documents

    def documents(self, part: str = "all") -> Iterator[str]:
        """Yield the documents of a split ("all", "train" or "val"), one at a time, never empty.

        A validation file is all validation. Of everything else, with 20 documents or more every tenth is
        validation; with fewer, the last tenth of the characters of each: of n characters the first
        int(0.9 * n) train.
        """
        return ("".join(blocks) for _, blocks in self.blocks(part))

    def blocks(self, part: str = "all") -> Iterator[tuple[int, Iterator[str]]]:
        """Yield (number, text in blocks) of each of the documents()."""
        if part not in ("all", "train", "val"):
            raise ValueError(part)
        for number, group in itertools.groupby(self.store.blocks(part), operator.itemgetter(0)):
            yield number, (text for _, text in group)

    def location(self, number: int) -> str:
        """Return file and line of a document, for messages; reads the files again."""
        documents = (location for source in self.sources
                     for location, group in itertools.groupby(self._read(source), operator.itemgetter(0))
                     if any(text for _, text in group))
        return next(itertools.islice(documents, number, None), self.name)

    def _read(self, source: Source) -> Iterator[tuple[str, str]]:
        """Yield (location, text) of the documents of a source, in blocks."""
        if not self.sources:
            return iter(((self.name, python_docs()),))
        read = rows.read_documents if inner_suffix(source.path) in rows.SUFFIXES else read_blocks
        return read(source, lambda source, notice: self.announce(f"{source.path}: {notice}"))

    def announce(self, line: str) -> None:
        """Log what was repaired or is odd, once."""
        if line not in self.notices:
            self.notices[line] = None
            log.warning(line)


def find(text: Sequence[str] = (), field: str = "text", progress: Progress | None = None,
         separator: str = separators.AUTO, normalize: str | None = None) -> Corpus:
    """Return the corpus of the command line's TEXT arguments: names, files, folders (recursive, sorted) and globs.

    Without arguments: Tiny Shakespeare or, if it is unavailable, the embedded python-docs, with a warning.

    Args:
        field: the field of a row that holds the text.
        separator: the text between the documents of a text file; "none": a file is one document; "auto": see
            data/separators.py.
        normalize: "nfc" for Unicode's form NFC; None leaves the text as it is.

    Raises:
        BardletError: anything missing, unreadable or empty.
    """
    if not text:
        try:
            return find([DEFAULT], field, progress, separator, normalize)
        except BardletError as error:
            log.warning("%s; training on the embedded corpus %s instead", error, EMBEDDED)
            return find([EMBEDDED], field, progress, separator, normalize)
    sources = [source for argument in text for source in _sources(argument, field, progress)]
    if EMBEDDED in text:
        if set(text) != {EMBEDDED}:
            raise BardletError(f"{EMBEDDED} is embedded and cannot be mixed with other texts; name it alone")
        return Corpus(EMBEDDED, (), "text", normalize)
    names = [a if a in NAMED else _stem(Path(a)) for a in dict.fromkeys(text)]
    name = "+".join(names[:3]) + (f"+{len(names) - 3}" if len(names) > 3 else "")
    seen: dict[Path, Source] = {}
    for source in sources:
        seen.setdefault(source.path.resolve(), source)
    title = console.listing([Path(a).name or a for a in dict.fromkeys(text)])
    corpus = Corpus(name, (), field, normalize, title=title)
    corpus.sources = tuple(_inspected(source, separator, corpus.digests) for source in seen.values())
    if field != "text" and not any(inner_suffix(source.path) in rows.SUFFIXES for source in corpus.sources):
        raise BardletError(f"--field {field}: only rows have fields ({' '.join(rows.SUFFIXES)}), and {', '.join(text)} "
                           "has none; drop it")
    return corpus


def _inspected(source: Source, separator: str, digests: dict[Path, bytes]) -> Source:
    """Return a source with the separator of its documents, which a named corpus has already, and hash its file."""
    beginning, digests[source.path] = inspect(source.path)
    if not beginning and not source.in_folder:
        raise BardletError(f"{source.path}: the file is empty; name a file that has some text")
    if source.separator is not None or inner_suffix(source.path) in rows.SUFFIXES:
        return source
    if separator != separators.AUTO:
        return dataclasses.replace(source, separator=separators.chosen(separator))
    found, notice = separators.found_in(beginning.decode("utf-8", "ignore").replace("\r\n", "\n"))
    if notice:
        log.warning("%s: %s", source.path, notice)
    return dataclasses.replace(source, separator=found, shuffled=found == separators.LINE_BREAK)


def _sources(argument: str, field: str, progress: Progress | None) -> list[Source]:
    """Return the sources of one TEXT argument."""
    if not argument.strip():
        raise BardletError("TEXT is an empty name (an unset variable?); name a file, a folder or a corpus")
    if argument in NAMED:
        if Path(argument).exists():
            log.warning('"%s" is a named corpus; to read the file or folder instead, write ./%s', argument, argument)
        if argument == EMBEDDED:
            return []
        folder, named = get(argument, progress), NAMED[argument]
        part = "train" if named.val else "both"
        own = [Source(folder / f, f"{argument}/{f}", part, separator=named.separator) for f in named.train]
        return own + [Source(folder / f, f"{argument}/{f}", "val") for f in named.val]
    if re.match(r"(?i)(https?|ftp)://", argument):
        name = _stem(Path(urllib.parse.unquote(urllib.parse.urlsplit(argument).path) or "text"))
        suffix = "".join(Path(urllib.parse.urlsplit(argument).path).suffixes[-2:])
        raise BardletError(f"{argument}: is a URL, and bardlet trains on files; download it first: "
                           f"curl -L -o {shlex.quote(name + (suffix or '.txt'))} {shlex.quote(argument)}")
    path = Path(argument)
    if os.path.lexists(path):
        return _walk(path, field) if path.is_dir() else [_file_source(path, path.name, field)]
    if re.search(r"[*?\[]", argument):
        matches = sorted(Path(p) for p in glob(argument, recursive=True))
        files = [_file_source(p, str(p), field) for p in matches if not p.is_dir()]
        if not files:
            raise BardletError(f"{argument}: no file matches this pattern; check it with ls")
        common = os.path.commonpath([s.path.parent for s in files])
        return [dataclasses.replace(s, label=Path(os.path.relpath(s.path, common)).as_posix(), in_pattern=True)
                for s in files]
    similar = _like(path) or did_you_mean(argument)
    raise BardletError(f"{argument}: no such file, folder or corpus{similar}; `bardlet data` lists the corpora")


def _like(path: Path) -> str:
    """Return the name in the folder of a missing file that is most like it, as a question; empty if there is none."""
    try:
        names = sorted(itertools.islice((entry.name for entry in os.scandir(path.parent)), 10_000))
    except OSError:
        return ""
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(path.name.casefold(), folded, n=1, cutoff=0.75)
    return f' (did you mean "{path.with_name(folded[close[0]])}"?)' if close else ""


def _file_source(path: Path, label: str, field: str) -> Source:
    """Return the source of a named file: its suffix is free, but it must be a regular file and not empty."""
    mode = _stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "not a regular file"
        raise BardletError(f"{path}: is {kind} and cannot be read twice; write its content to a file first")
    return Source(path, label, field=field)


def _walk(folder: Path, field: str) -> list[Source]:
    """Return the text files of a folder and its subfolders, sorted by path, without hidden ones.

    Links to folders are followed, each folder once. Files of other kinds are left out, with a notice.
    """
    sources: list[Source] = []
    left_out: dict[str, int] = {}
    visited: set[str] = set()

    def fail(error: OSError) -> None:
        raise BardletError(f"{error.filename}: cannot be read ({error.strerror}); change its permissions") from None

    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(parent) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = [f for f in folders if not f.startswith(".")]
        for path in (Path(parent) / file for file in files if not file.startswith(".")):
            suffix = inner_suffix(path)
            if suffix not in WALKED and not (suffix == "" and path.suffix in OPENERS):
                left_out[suffix or "without a suffix"] = left_out.get(suffix or "without a suffix", 0) + 1
            elif stat.S_ISREG(_stat(path).st_mode):
                if path.stat().st_size:
                    sources.append(Source(path, path.relative_to(folder).as_posix(), field=field, in_folder=True))
                else:
                    log.warning("%s: the file is empty; skipping it", path)
    most = sorted(left_out.items(), key=lambda item: -item[1])[:5]
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in most)
    suffixes = (suffix for suffix, _ in most if suffix.startswith(".") and suffix not in NO_TEXT)
    pattern = quoted(f"{escape(str(folder))}/**/*{next(suffixes, '')}")
    if not sources:
        found = f" (but {kinds})" if kinds else ""
        raise BardletError(
            f"{folder}: no text files in the folder{found}; bardlet looks for {' '.join(WALKED)}, also compressed; "
            f"name a file, or a pattern as {pattern}, to read it whatever its suffix"
        )
    if left_out:
        remedy = (f"; to read them, name them or a pattern, as in {pattern}" if set(left_out) - set(NO_TEXT) else
                  "; they are no text files: name one, and bardlet says what converts it")
        log.warning("%s: left out %s: %s%s", folder, console.count(sum(left_out.values()), "file"), kinds, remedy)
    return sorted(sources, key=lambda source: source.label)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}); check that it still exists") from None


def _stem(path: Path) -> str:
    path = Path(path.resolve().name)
    while path.suffix.lower() in (*OPENERS, *TEXT_SUFFIXES, *rows.SUFFIXES):
        path = Path(path.stem)
    return re.sub(r"[^\w.-]+", "_", path.name).strip("_.") or "text"
