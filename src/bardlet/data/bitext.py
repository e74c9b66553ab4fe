"""Where sentence pairs come from: two files whose lines say the same, or a named parallel corpus.

A pair is a line of the source and the line of the target with the same number.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bardlet.config.pretraining import TranslationConfig
from bardlet.data.corpus import MAX_FILES_LISTED, folder_with
from bardlet.data.text import Source, digest_of, read_text
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class NamedPairs:
    """A parallel corpus that has a name: a file for each part and language, in the folder of that name.

    lowercase: whether its results are always quoted in lower case, so that a model of it need not know capitals.
    """

    what: str
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
    """The folder of a named parallel corpus, $BARDLET_DATA before the cache; None: nowhere."""
    named = NAMED[name]
    parts = (part.format(language) for part in (named.train, named.val) for language in named.languages)
    return folder_with(name, list(parts))


@dataclass
class ParallelCorpus:
    """Pairs of lines. train, val: (source, target) files; without files for validation every tenth pair is held out."""

    name: str
    train: tuple[Path, Path]
    val: tuple[Path, Path] | None
    lowercase: bool

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over the bytes of the files; not over where they lie, or what they are called."""
        paths = (*self.train, *(self.val or ()))
        return hashlib.sha256(b"".join(map(digest_of, paths))).hexdigest()

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        """The pairs of "train" or "val" in their order; one with an empty side is left out."""
        whole = [pair for pair in read_pairs(*(self.val if self.val and part == "val" else self.train)) if all(pair)]
        if self.val:
            yield from whole
        elif len(whole) < MAX_FILES_LISTED:
            raise BardletError(f"{self.name}: {len(whole)} pairs are too few to train on and to hold some out: "
                               f"give {MAX_FILES_LISTED} or more")
        else:
            yield from (pair for i, pair in enumerate(whole) if (i % 10 == 9) == (part == "val"))


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without white space around them. BardletError where it cannot be read, or is no text."""
    _present(path)
    [(_, text)] = read_text(Source(path, path.name), lambda source, what: log.warning("%s: %s", source.path, what))
    lines = text.split("\n")  # nothing else ends a line here: other tools count the same
    return [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]


def _present(path: Path) -> Path:
    """`path`, if there is a file, or something else that can be read."""
    if not path.exists() or path.is_dir():
        raise BardletError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}; "
                           "name a text file with a sentence a line")
    return path


def read_pairs(source: Path, target: Path) -> list[tuple[str, str]]:
    """The lines of two files, side by side. BardletError where they have different numbers of them."""
    left, right = read_lines(source), read_lines(target)
    if len(left) != len(right):
        raise BardletError(f"{source} has {len(left):,} lines and {target} {len(right):,}: they do not belong "
                           "together; line n of one must be the translation of line n of the other")
    return list(zip(left, right, strict=True))


def find(config: TranslationConfig) -> ParallelCorpus:
    """The pairs that the settings name. BardletError for what is not there."""
    if config.source is not None or config.target is not None:
        if config.source is None or config.target is None:
            raise BardletError("--source and --target belong together: name both files")
        if config.pair or config.text:
            raise BardletError("--source and --target name the pairs already: leave out "
                               + ("--pair" if config.pair else " ".join(config.text)))
        source, target = _present(Path(config.source)), _present(Path(config.target))
        name = f"{_stem(source)}-{_stem(target)}"
        return ParallelCorpus(name, (source, target), None, bool(config.lowercase))
    if len(config.text) > 1 or (config.text and config.text[0] not in NAMED):
        raise BardletError(f"--pair {config.pair} is for a named parallel corpus ({', '.join(NAMED)}), and "
                           f"{' '.join(config.text)} is none; for files of your own: --source F --target F")
    name = config.text[0] if config.text else DEFAULT
    named, folder = NAMED[name], locate(name)
    left, _, right = (config.pair or "").partition("-")
    if left not in named.languages or right not in named.languages or left == right:
        raise BardletError(f"--pair {config.pair or '(none)'}: {name} has {', '.join(named.languages)}; "
                           "write from-to, as in --pair de-en")
    if folder is None:
        raise BardletError(f"the corpus {name} is not on this machine and has no download: put its files "
                           f"({named.train.format('LANGUAGE')}, {named.val.format('LANGUAGE')}) into the folder {name} "
                           "of $BARDLET_DATA")
    train, val = ((folder / part.format(left), folder / part.format(right)) for part in (named.train, named.val))
    lowercase = named.lowercase if config.lowercase is None else config.lowercase
    return ParallelCorpus(f"{name}-{left}-{right}", train, val, lowercase)


def _stem(path: Path) -> str:
    """The name of a file without the suffix of its compression; `a.de` and `a.en` must not look the same."""
    return path.stem if path.suffix in (".gz", ".xz") else path.name
