"""Named corpora, files, folders and globs, read as documents of clean Unicode.

A corpus is a list of sources in reading order. data/text.py reads a single file; this module finds the files, names
them, and splits their documents into training and validation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path

from bardlet.data import rows, separators
from bardlet.data.named import DEFAULT, EMBEDDED, NAMED, Progress, did_you_mean, get, python_docs
from bardlet.data.text import (
    OPENERS,
    TEXT_SUFFIXES,
    Source,
    digest_of,
    inner_suffix,
    open_raw,
    read_text,
)
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

WALKED = (*TEXT_SUFFIXES, ".jsonl", ".ndjson")
"""Suffixes of the files that are read from a folder; other files must be named."""
MIN_TO_SPLIT = 20  # with at least this many documents, whole documents are held out


def dev_split_start(count: int) -> int:
    """Return the start of the development split, the last tenth of `count` training tokens, pairs or records."""
    return int(0.9 * count)


# ------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Documents from files. field: the key of a .jsonl line that holds the text."""

    name: str
    sources: tuple[Source, ...]
    field: str = "text"
    _warned: set[str] = dataclasses.field(default_factory=set, repr=False)

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
            digest.update(digest_of(source.path))
        if not self.sources:
            digest.update(python_docs().encode())
        return digest.hexdigest()

    @cached_property
    def needs_separator(self) -> bool:
        """True if the training split has more than one document."""
        return len(list(itertools.islice(self.located_documents("train"), 2))) > 1

    @cached_property
    def count(self) -> int:
        """Number of documents; reads the whole text."""
        return sum(1 for _ in self.documents())

    @cached_property
    def splits_documents(self) -> bool:
        """True if there are 20 documents or more, enough to hold out whole ones."""
        return len(list(itertools.islice(self._read("both"), MIN_TO_SPLIT))) == MIN_TO_SPLIT

    def documents(self, part: str = "all") -> Iterator[str]:
        """Yield the documents of a split ("all", "train" or "val"), one at a time, never empty.

        A validation file is all validation. Of everything else, with 20 documents or more every tenth is
        validation; with fewer, the last tenth of the characters of each: of n characters the first
        int(0.9 * n) train.
        """
        return (text for _, text in self.located_documents(part))

    def located_documents(self, part: str = "all") -> Iterator[tuple[str, str]]:
        """Yield (file and line, text) of each of the documents()."""
        if part not in ("all", "train", "val"):
            raise ValueError(part)
        count = 0
        for source, location, text in self._read("any"):
            if part == "all" or source.part == part:
                yield location, text
            elif source.part == "both":
                if self.splits_documents:
                    kept = text if (count % 10 == 9) == (part == "val") else ""
                else:
                    cut = int(0.9 * len(text))
                    kept = text[:cut] if part == "train" else text[cut:]
                count += 1
                if kept:
                    yield location, kept

    def _read(self, part: str) -> Iterator[tuple[Source, str, str]]:
        if not self.sources:
            yield Source(Path(self.name), self.name), self.name, python_docs()
        for source in self.sources:
            if part in ("any", source.part):
                read = rows.read_documents if inner_suffix(source.path) in rows.SUFFIXES else read_text
                for location, text in read(source, self._notice):
                    if text:
                        yield source, location, text

    def _notice(self, source: Source, notice: str) -> None:
        """Log what was repaired in a file, once per file."""
        line = f"{source.path}: {notice}"
        if line not in self._warned:
            self._warned.add(line)
            log.warning(line)


def find(text: Sequence[str] = (), field: str = "text", progress: Progress | None = None,
         separator: str = separators.AUTO) -> Corpus:
    """Return the corpus of the command line's TEXT arguments: names, files, folders (recursive, sorted) and globs.

    Without arguments: Tiny Shakespeare or, if it is unavailable, the embedded python-docs, with a warning.

    Args:
        field: the field of a row that holds the text.
        separator: the text between the documents of a text file; "none": a file is one document; "auto": see
            data/separators.py.

    Raises:
        BardletError: anything missing, unreadable or empty.
    """
    if not text:
        try:
            return find([DEFAULT], field, progress, separator)
        except BardletError as error:
            log.warning("%s; training on the embedded corpus %s instead", error, EMBEDDED)
            return find([EMBEDDED], field, progress, separator)
    sources: list[Source] = []
    for argument in text:
        sources += _sources(argument, field, progress)
    seen: set[Path] = set()
    unique = [_separated(s, separator) for s in sources
              if not (s.path.resolve() in seen or seen.add(s.path.resolve()))]  # type: ignore[func-returns-value]
    if EMBEDDED in text:
        if set(text) != {EMBEDDED}:
            raise BardletError(f"{EMBEDDED} is embedded and cannot be mixed with other texts; name it alone")
        return Corpus(EMBEDDED, (), "text")
    names = [a if a in NAMED else _stem(Path(a)) for a in dict.fromkeys(text)]
    name = "+".join(names[:3]) + (f"+{len(names) - 3}" if len(names) > 3 else "")
    corpus = Corpus(name, tuple(unique), field)
    if field != "text" and not any(inner_suffix(source.path) in rows.SUFFIXES for source in unique):
        raise BardletError(f"--field {field}: only rows have fields ({' '.join(rows.SUFFIXES)}), and {', '.join(text)} "
                           "has none; drop it")
    if next(corpus.documents(), None) is None:
        raise BardletError(f"{', '.join(text)}: no text in it; name a file that has some")
    return corpus


def _separated(source: Source, separator: str) -> Source:
    """Return a source with the separator of its documents, which a named corpus has already."""
    if source.separator is not None or inner_suffix(source.path) in rows.SUFFIXES:
        return source
    if separator != separators.AUTO:
        return dataclasses.replace(source, separator=separators.chosen(separator))
    with open_raw(source.path) as file:
        sample = file.read(1 << 18).decode("utf-8", "ignore").replace("\r\n", "\n")
    found, notice = separators.found_in(sample)
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
    path = Path(argument)
    if os.path.lexists(path):
        return _walk(path, field) if path.is_dir() else [_file_source(path, path.name, field)]
    if re.search(r"[*?\[]", argument):
        matches = sorted(Path(p) for p in glob(argument, recursive=True))
        files = [_file_source(p, str(p), field) for p in matches if not p.is_dir()]
        if not files:
            raise BardletError(f"{argument}: no file matches this pattern; check it with ls")
        common = os.path.commonpath([s.path.parent for s in files])
        return [dataclasses.replace(s, label=Path(os.path.relpath(s.path, common)).as_posix()) for s in files]
    raise BardletError(
        f"{argument}: no such file, folder or corpus{did_you_mean(argument)}; `bardlet data` lists the corpora"
    )


def _file_source(path: Path, label: str, field: str) -> Source:
    """Return the source of a named file: its suffix is free, but it must be a regular file and not empty."""
    mode = _stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "not a regular file"
        raise BardletError(f"{path}: is {kind} and cannot be read twice; write its content to a file first")
    with open_raw(path) as file:
        if not file.read(1):
            raise BardletError(f"{path}: the file is empty; name a file that has some text")
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
                    sources.append(Source(path, path.relative_to(folder).as_posix(), field=field))
                else:
                    log.warning("%s: the file is empty; skipping it", path)
    most = sorted(left_out.items(), key=lambda item: -item[1])[:5]
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in most)
    pattern = f"'{folder}/**/*{next((suffix for suffix in left_out if suffix.startswith('.')), '')}'"
    if not sources:
        found = f" (but {kinds})" if kinds else ""
        raise BardletError(
            f"{folder}: no text files in the folder{found}; bardlet looks for {' '.join(WALKED)}, also compressed; "
            f"name a file, or a pattern as {pattern}, to read it whatever its suffix"
        )
    if left_out:
        log.warning("%s: left out %d files: %s; to read them, name them or a pattern, as in %s", folder,
                    sum(left_out.values()), kinds, pattern)
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
