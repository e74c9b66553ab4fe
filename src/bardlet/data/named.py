"""The named corpora: where each is, how to get it, and the one that is part of Python."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import re
import stat
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bardlet.config.paths import given
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class NamedCorpus:
    """A named corpus. Its files are in the folder of that name under $BARDLET_DATA or the cache.

    val: validation files; if empty, Corpus.documents splits the others. separator: regular expression that
    separates the documents of a text file. url, sha256: download of a corpus that is one plain file.
    """

    description: str
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    separator: str | None = None
    url: str | None = None
    sha256: str | None = None


NAMED = {
    "tinyshakespeare": NamedCorpus(
        "40,000 lines of Shakespeare, 1.1 MB",
        ("input.txt",),
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # Each name is a document: the files are sorted, so the last tenth of a file would be the names from T to Z.
    # A model that knows where a name ends can also write a single one.
    "names": NamedCorpus("7,944 English first names, 56 kB", ("female.txt", "male.txt"), separator=r"\n"),
    "tinystories-lower": NamedCorpus(
        "5,500 short stories for children, lower case, 4.2 MB",
        ("tinystories_lower.txt.xz",),
        separator=r"(?<!\n)\n(?!\n)",  # an empty line separates paragraphs, a single line break separates stories
    ),
    # The collection lacks WikiText-2's training file: train on its test file, validate on its validation file
    "wikitext-2": NamedCorpus("Wikipedia articles, tokenized, 2.4 MB", ("test.txt.gz",), ("valid.txt.gz",)),
    "eltec-eng": NamedCorpus(
        "99 English novels 1840-1920, 64 MB", ("core.jsonl.xz", "rest.jsonl.xz"), ("val.jsonl.xz",)
    ),
    "eltec-fra": NamedCorpus("14 French novels, 11 MB", ("train.jsonl.xz",), ("val.jsonl.xz",)),
    # tang300, the third file of the collection, is an anthology: tang_all has its poems, too
    "chinese-poetry": NamedCorpus("57,883 Chinese poems, 12 MB", ("song300.jsonl", "tang_all.jsonl.xz")),
    "factbook": NamedCorpus("261 countries of the CIA World Factbook, 7 MB", ("factbook.jsonl.xz",)),
    "python-docs": NamedCorpus("prose of Python's documentation, part of every Python"),
}
DEFAULT, EMBEDDED = "tinyshakespeare", "python-docs"


def cache_folder() -> Path:
    """Return $BARDLET_CACHE, or the operating system's cache folder of the user; without a home, a temporary one."""
    if os.environ.get("BARDLET_CACHE"):
        return Path(given(os.environ["BARDLET_CACHE"]))
    import platformdirs

    try:
        return Path(platformdirs.user_cache_dir("bardlet"))
    except RuntimeError:  # no HOME, and a user id that the system does not know
        folder = _temporary_cache()
        _note_once(f"this user has no home folder; the cache is in {folder}. Set BARDLET_CACHE to choose another")
        return folder


@cache
def _temporary_cache() -> Path:
    """Return a cache folder of this user alone: others may write to the folder of temporary files, and compiled code in
    a cache is run."""
    folder = Path(tempfile.gettempdir()) / f"bardlet-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="bardlet-"))


@cache
def _note_once(message: str) -> None:
    log.warning(message)


def locate(name: str) -> Path | None:
    """Return the folder that has every file of a named corpus, or None."""
    named = NAMED[name]
    return folder_with(name, named.train + named.val) if named.train else None


def folder_with(name: str, files: Sequence[str]) -> Path | None:
    """Return the folder NAME that has all the files, looking in $BARDLET_DATA before the cache, or None."""
    roots = [Path(given(os.environ["BARDLET_DATA"]))] if os.environ.get("BARDLET_DATA") else []
    folders = (root / name for root in [*roots, cache_folder() / "data"])
    return next((folder for folder in folders if all((folder / file).is_file() for file in files)), None)


def get(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of a named corpus, after downloading it into the cache if it is not on this machine.

    BardletError with the remedy if it is unavailable. Atomic: a failed download leaves nothing behind.
    """
    if name not in NAMED:
        raise BardletError(f'no corpus called "{name}"{did_you_mean(name)}; `bardlet data` lists them')
    named, folder = NAMED[name], locate(name)
    if folder is not None:
        return folder
    remedy = f"put {', '.join(named.train + named.val)} into $BARDLET_DATA/{name}"
    if named.url is None:
        raise BardletError(f"the corpus {name} is not on this machine and has no download; {remedy}")
    target = cache_folder() / "data" / name / named.train[0]
    try:
        _download(named.url, target, named.sha256 or "", progress)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        raise BardletError(f"{name} could not be downloaded from {named.url} ({reason}); {remedy}") from None
    return target.parent


def _download(url: str, target: Path, sha256: str, progress: Progress | None) -> None:
    """Download `url` to `target`. OSError if the download fails, ValueError if its sha256 (hex) differs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=15) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            while block := response.read(1 << 16):
                file.write(block)
                digest.update(block)
                if progress:
                    progress(f"downloading {target.parent.name}", file.tell(), total)
        if digest.hexdigest() != sha256:
            raise ValueError(f"its sha256 is {digest.hexdigest()[:12]}..., not {sha256[:12]}...")
        os.replace(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def did_you_mean(name: str) -> str:
    """Return the named corpus that is most like a name, as a question in parentheses; empty if none is."""
    close = difflib.get_close_matches(name, NAMED, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


# --------------------------------------------------------------------------------- embedded corpus


def python_docs() -> str:
    """Return the prose of Python's reference (pydoc_data.topics) as one document; it differs between Python versions.

    Keeps headings and paragraphs, one per line and each once (topics quote each other); drops code, grammar and tables.
    """
    from pydoc_data.topics import topics

    kept: dict[str, None] = {}
    for _, topic in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", topic.strip("\n")):
            lines = [line.rstrip() for line in block.split("\n")]
            if len(lines) == 2 and re.fullmatch(r"([*=\-~^#])\1+", lines[1]):
                del lines[1]  # the underline of a heading
            elif not _is_prose(lines):
                continue
            kept[" ".join(" ".join(lines).split())] = None
    return "\n\n".join(kept) + "\n"


def _is_prose(lines: list[str]) -> bool:
    """Return True if a block of the reference is prose rather than code, grammar or a table."""
    text = " ".join(line.strip() for line in lines)
    text = re.sub(r"^(\* |\d+\. |\[\d+\] )", "", text)
    table = any(re.search(r"^\s*[+|>]|\S {3,}\S", line) for line in lines)
    sentence = len(text) > 40 and text[0].isalpha() and text[-1] in ".:)" and " " in text[:25]
    body = lines[0].startswith("   ") and text[0].islower()  # code that looks like a sentence
    return sentence and "::=" not in text and not table and not body
