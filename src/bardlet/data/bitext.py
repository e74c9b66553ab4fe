"""Sentence pairs from two line-aligned files or a named parallel corpus.

A pair is line n of the source file and line n of the target file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bardlet.config.pretraining import TranslationConfig
from bardlet.data.blocks import read_text
from bardlet.data.named import folder_with
from bardlet.data.text import MIN_TO_SPLIT, Source, digest_of
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class NamedPairs:
    """A named parallel corpus: a file per split and language, in the folder of that name.

    lowercase: its results are always quoted in lower case, so by default a model trains on lower-cased text.
    """

    description: str
    languages: tuple[str, ...]
    train: str
    val: str
    lowercase: bool


NAMED = {
    "multi30k": NamedPairs("30,014 captions in en, de, fr, cs (--pair de-en), 8 MB",
                           ("en", "de", "fr", "cs"), "train.{}.gz", "val.{}.gz", lowercase=True),
}
DEFAULT = "multi30k"


def locate(name: str) -> Path | None:
    """Return the folder of a named parallel corpus, looking in $BARDLET_DATA before the cache, or None."""
    named = NAMED[name]
    parts = (part.format(language) for part in (named.train, named.val) for language in named.languages)
    return folder_with(name, list(parts))


@dataclass
class ParallelCorpus:
    """Pairs of lines. train, val: (source, target) files; without validation files every tenth pair is held out."""

    name: str
    train: tuple[Path, Path]
    val: tuple[Path, Path] | None
    lowercase: bool

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the bytes of the files, whatever their paths and names."""
        paths = (*self.train, *(self.val or ()))
        return hashlib.sha256(b"".join(map(digest_of, paths))).hexdigest()

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        """Yield the pairs of "train" or "val" in order, without pairs that have an empty side."""
        complete = [pair for pair in read_pairs(*(self.val if self.val and part == "val" else self.train)) if all(pair)]
        if self.val:
            yield from complete
        elif len(complete) < MIN_TO_SPLIT:
            raise BardletError(f"{self.name}: {len(complete)} pairs are too few to hold some out for validation; "
                               f"provide at least {MIN_TO_SPLIT}")
        else:
            yield from (pair for i, pair in enumerate(complete) if (i % 10 == 9) == (part == "val"))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file without surrounding white space. BardletError if it is unreadable or not text."""
    _check_file(path)
    [(_, text)] = read_text(Source(path, path.name), lambda source, notice: log.warning("%s: %s", source.path, notice))
    lines = text.split("\n")  # only "\n" ends a line, so that other tools count the same lines
    return [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]


def _check_file(path: Path) -> Path:
    """Return `path`. BardletError if it is missing or a folder; it need not be a regular file."""
    if not path.exists() or path.is_dir():
        raise BardletError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; "
                           "name a text file with one sentence per line")
    return path


def read_pairs(source: Path, target: Path) -> list[tuple[str, str]]:
    """Return the lines of two files as pairs. BardletError if the files have different numbers of lines."""
    left, right = read_lines(source), read_lines(target)
    if len(left) != len(right):
        raise BardletError(f"{source} has {len(left):,} lines but {target} has {len(right):,}; "
                           "line n of one must be the translation of line n of the other")
    return list(zip(left, right, strict=True))


def find(config: TranslationConfig) -> ParallelCorpus:
    """Return the pairs that the settings name. BardletError if they are missing or the settings conflict."""
    if config.source is not None or config.target is not None:
        if config.source is None or config.target is None:
            raise BardletError("--source and --target go together; name both files")
        if config.pair or config.text:
            raise BardletError("--source and --target already name the pairs; drop "
                               + ("--pair" if config.pair else " ".join(config.text)))
        source, target = _check_file(Path(config.source)), _check_file(Path(config.target))
        name = f"{_stem(source)}-{_stem(target)}"
        return ParallelCorpus(name, (source, target), None, bool(config.lowercase))
    if len(config.text) > 1 or (config.text and config.text[0] not in NAMED):
        raise BardletError(f"{' '.join(config.text)}: not a named parallel corpus ({', '.join(NAMED)}); "
                           "for your own files use --source F --target F")
    name = config.text[0] if config.text else DEFAULT
    named, folder = NAMED[name], locate(name)
    left, _, right = (config.pair or "").partition("-")
    if left not in named.languages or right not in named.languages or left == right:
        raise BardletError(f"--pair {config.pair or '(none)'}: {name} has {', '.join(named.languages)}; "
                           "write source-target, for example --pair de-en")
    if folder is None:
        raise BardletError(f"the corpus {name} is not on this machine and has no download; put its files "
                           f"({named.train.format('LANGUAGE')}, {named.val.format('LANGUAGE')}) into "
                           f"$BARDLET_DATA/{name}")
    train, val = ((folder / part.format(left), folder / part.format(right)) for part in (named.train, named.val))
    lowercase = named.lowercase if config.lowercase is None else config.lowercase
    return ParallelCorpus(f"{name}-{left}-{right}", train, val, lowercase)


def _stem(path: Path) -> str:
    """Return the name of a file without its compression suffix; `a.de` and `a.en` must stay different."""
    return path.stem if path.suffix in (".gz", ".xz") else path.name
