"""Where text comes from: named corpora, files, folders and globs, read as documents of clean Unicode.

A corpus is a list of sources. A source is one file: a text file is one document, a .jsonl file has one a
line. Everything is read as UTF-8 whatever the machine's locale; what can be mended is mended and said
(a byte order mark, UTF-16, Windows line ends), and what cannot is an error with its file and byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import re
import stat
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import IO

from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

Progress = Callable[[str, int, int | None], None]

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
MANY = 20  # from so many documents on, whole documents are held out


# ------------------------------------------------------------------------------------ named corpora


@dataclass(frozen=True)
class Named:
    """A corpus that has a name. Files lie in the folder of that name under $BARDLET_DATA or the cache.

    val: files that are the validation part; empty: the rule of Corpus.documents. between: a regular
    expression, what lies between two documents of a text file. url, sha256: where one plain file is from.
    """

    what: str
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    between: str | None = None
    url: str | None = None
    sha256: str | None = None


NAMED = {
    "tinyshakespeare": Named(
        "40,000 lines of Shakespeare, 1.1 MB",
        ("input.txt",),
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # A name is a document: the files are sorted, so the last tenth of each would be names from T to Z,
    # and a model that knows where a name ends can be asked for one name
    "names": Named("7,944 English first names, 56 kB", ("female.txt", "male.txt"), between=r"\n"),
    "tinystories-lower": Named(
        "5,500 short stories for children, lower case, 4.2 MB",
        ("tinystories_lower.txt.xz",),
        between=r"(?<!\n)\n(?!\n)",  # an empty line separates paragraphs, a single line end two stories
    ),
    # WikiText-2's own training file is not in the collection: its test half trains, its validation half judges
    "wikitext-2": Named("Wikipedia articles, tokenised, 2.4 MB", ("test.txt.gz",), ("valid.txt.gz",)),
    "eltec-eng": Named("99 English novels 1840-1920, 64 MB", ("core.jsonl.xz", "rest.jsonl.xz"), ("val.jsonl.xz",)),
    "eltec-fra": Named("14 French novels, 11 MB", ("train.jsonl.xz",), ("val.jsonl.xz",)),
    # tang300, the third file of the set, is an anthology of poems that are in tang_all too
    "chinese-poetry": Named("57,883 Chinese poems, 12 MB", ("song300.jsonl", "tang_all.jsonl.xz")),
    "factbook": Named("261 countries of the CIA World Factbook, 7 MB", ("factbook.jsonl.xz",)),
    "python-docs": Named("the prose of Python's own documentation, embedded in every Python"),
}
DEFAULT, EMBEDDED = "tinyshakespeare", "python-docs"


def cache_folder() -> Path:
    """$BARDLET_CACHE, or the user's cache folder as the operating system names it."""
    if os.environ.get("BARDLET_CACHE"):
        return Path(os.environ["BARDLET_CACHE"])
    import platformdirs

    return Path(platformdirs.user_cache_dir("bardlet"))


def locate(name: str) -> Path | None:
    """The folder that holds every file of a named corpus, $BARDLET_DATA before the cache; None: nowhere."""
    named = NAMED[name]
    roots = [Path(os.environ["BARDLET_DATA"])] if os.environ.get("BARDLET_DATA") else []
    for root in [*roots, cache_folder() / "data"]:
        folder = root / name
        if named.train and all((folder / file).is_file() for file in named.train + named.val):
            return folder
    return None


def get(name: str, progress: Progress | None = None) -> Path:
    """The folder of a named corpus, downloaded into the cache when it is nowhere else.

    BardletError with the remedy when it cannot be had. Atomic: a broken download leaves nothing behind.
    """
    if name not in NAMED:
        raise BardletError(f'there is no corpus called "{name}"{_did_you_mean(name)}; `bardlet data` lists them')
    named, folder = NAMED[name], locate(name)
    if folder is not None:
        return folder
    where = f"put {', '.join(named.train + named.val)} into the folder {name} of $BARDLET_DATA"
    if named.url is None:
        raise BardletError(f"the corpus {name} is not on this machine and has no download: {where}")
    target = cache_folder() / "data" / name / named.train[0]
    try:
        _download(named.url, target, named.sha256 or "", progress)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        raise BardletError(f"{name} could not be downloaded from {named.url} ({reason}): {where}") from None
    return target.parent


def _download(url: str, target: Path, sha256: str, progress: Progress | None) -> None:
    """Fetches url into target: OSError when it fails, ValueError when the sha256 (hex) differs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=15) as answer:
            total = int(answer.headers.get("Content-Length") or 0) or None
            while block := answer.read(1 << 16):
                file.write(block)
                digest.update(block)
                if progress:
                    progress(f"download {target.parent.name}", file.tell(), total)
        if digest.hexdigest() != sha256:
            raise ValueError(f"its sha256 is {digest.hexdigest()[:12]}..., not {sha256[:12]}...")
        os.replace(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


# ------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Source:
    """One file. label: its name in hashes and messages; part: "both" (to be split), "train" or "val"."""

    path: Path
    label: str
    part: str = "both"
    field: str = "text"
    between: str | None = None

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object with the text of a document."""
        return _inner_suffix(self.path) == ".jsonl"


@dataclass
class Corpus:
    """Documents from files. field: the key of a .jsonl line that holds the text."""

    name: str
    sources: tuple[Source, ...]
    field: str = "text"
    _told: set[str] = dataclasses.field(default_factory=set, repr=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in reading order; none for the embedded corpus."""
        return tuple(source.path for source in self.sources)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over the labels, parts, fields and raw bytes of the files; not over where they lie."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(repr((source.label, source.part, source.field, source.between)).encode())
            with _open_raw(source.path, compressed=True) as file:
                inner = hashlib.sha256()
                while block := file.read(1 << 20):
                    inner.update(block)
            digest.update(inner.digest())
        if not self.sources:
            digest.update(python_docs().encode())
        return digest.hexdigest()

    @cached_property
    def several(self) -> bool:
        """Whether the training part has more than one document, so that something must separate them."""
        return len(list(itertools.islice(self.labelled("train"), 2))) > 1

    @cached_property
    def count(self) -> int:
        """How many documents there are; reads the whole text."""
        return sum(1 for _ in self.documents())

    @cached_property
    def _many(self) -> bool:
        return len(list(itertools.islice(self._read("both"), MANY))) == MANY

    def documents(self, part: str = "all") -> Iterator[str]:
        """The documents of a part ("all", "train" or "val"), one at a time, never empty.

        A file of its own for validation is validation. Of everything else, with 20 documents or more every
        tenth is validation; with fewer, the last tenth of the characters of each: of n characters the first
        int(0.9 * n) train.
        """
        return (text for _, text in self.labelled(part))

    def labelled(self, part: str = "all") -> Iterator[tuple[str, str]]:
        """documents() with the place of each: (file and line, text)."""
        if part not in ("all", "train", "val"):
            raise ValueError(part)
        count = 0
        for source, place, text in self._read("any"):
            if part == "all" or source.part == part:
                yield place, text
            elif source.part == "both":
                if self._many:
                    kept = text if (count % 10 == 9) == (part == "val") else ""
                else:
                    cut = int(0.9 * len(text))
                    kept = text[:cut] if part == "train" else text[cut:]
                count += 1
                if kept:
                    yield place, kept

    def _read(self, part: str) -> Iterator[tuple[Source, str, str]]:
        if not self.sources:
            yield Source(Path(self.name), self.name), self.name, python_docs()
        for source in self.sources:
            if part in ("any", source.part):
                read = _read_jsonl if source.is_jsonl else _read_text
                for place, text in read(source, self._notice):
                    if text:
                        yield source, place, text

    def _notice(self, source: Source, what: str) -> None:
        """Says once per file what was mended."""
        line = f"{source.path}: {what}"
        if line not in self._told:
            self._told.add(line)
            log.warning(line)


def find(text: Sequence[str] = (), field: str = "text", progress: Progress | None = None) -> Corpus:
    """The corpus of the command line's TEXT arguments: names, files, folders (recursive, sorted) and globs.

    Without any: Tiny Shakespeare, or where it cannot be had the embedded python-docs, said in one line.
    field: the key of .jsonl lines. BardletError for anything that is not there, not readable or empty.
    """
    if not text:
        try:
            return find([DEFAULT], field, progress)
        except BardletError as error:
            log.warning("%s; training on the embedded corpus %s instead", error, EMBEDDED)
            return find([EMBEDDED], field)
    sources: list[Source] = []
    for argument in text:
        sources += _sources(argument, field, progress)
    seen: set[Path] = set()
    unique = [s for s in sources if not (s.path.resolve() in seen or seen.add(s.path.resolve()))]  # type: ignore[func-returns-value]
    if EMBEDDED in text:
        if set(text) != {EMBEDDED}:
            raise BardletError(f"{EMBEDDED} is embedded and cannot be mixed with other texts: name it alone")
        return Corpus(EMBEDDED, (), "text")
    names = [a if a in NAMED else _stem(Path(a)) for a in dict.fromkeys(text)]
    name = "+".join(names[:3]) + (f"+{len(names) - 3}" if len(names) > 3 else "")
    corpus = Corpus(name, tuple(unique), field)
    if next(corpus.documents(), None) is None:
        raise BardletError(f"{', '.join(text)}: there is no text in it: name a file that has some")
    return corpus


def _sources(argument: str, field: str, progress: Progress | None) -> list[Source]:
    """What one TEXT argument stands for."""
    if argument in NAMED:
        if Path(argument).exists():
            log.warning('"%s" is the named corpus; for the file or folder here write ./%s', argument, argument)
        if argument == EMBEDDED:
            return []
        folder, named = get(argument, progress), NAMED[argument]
        part = "train" if named.val else "both"
        own = [Source(folder / f, f"{argument}/{f}", part, between=named.between) for f in named.train]
        return own + [Source(folder / f, f"{argument}/{f}", "val") for f in named.val]
    path = Path(argument)
    if os.path.lexists(path):
        return _walk(path, field) if path.is_dir() else [_one(path, path.name, field)]
    if re.search(r"[*?\[]", argument):
        found = sorted(Path(p) for p in glob(argument, recursive=True))
        files = [_one(p, str(p), field) for p in found if not p.is_dir()]
        if not files:
            raise BardletError(f"{argument}: no file matches this pattern: check it with ls")
        common = os.path.commonpath([s.path.parent for s in files])
        return [dataclasses.replace(s, label=Path(os.path.relpath(s.path, common)).as_posix()) for s in files]
    raise BardletError(
        f"{argument}: there is no such file or folder, and no corpus of that name{_did_you_mean(argument)}; "
        "`bardlet data` lists the corpora"
    )


def _one(path: Path, label: str, field: str) -> Source:
    """A file that was named: read whatever its suffix, but it must be an ordinary file with something in it."""
    mode = _stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "not an ordinary file"
        raise BardletError(f"{path}: is {kind}, which cannot be read twice: write its content to a file first")
    with _open_raw(path) as file:
        if not file.read(1):
            raise BardletError(f"{path}: the file is empty: name a file that has some text")
    return Source(path, label, field=field)


def _walk(folder: Path, field: str) -> list[Source]:
    """The text files of a folder and the folders in it, sorted by path; hidden ones are left out."""
    found: list[Source] = []

    def fail(error: OSError) -> None:
        raise BardletError(f"{error.filename}: cannot be read ({error.strerror}): change its permissions") from None

    for here, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            path = Path(here) / file
            known = _inner_suffix(path) in (*TEXT_SUFFIXES, *([""] if path.suffix in OPENERS else []))
            if known and not file.startswith(".") and stat.S_ISREG(_stat(path).st_mode):
                label = path.relative_to(folder).as_posix()
                if path.stat().st_size:
                    found.append(Source(path, label, field=field))
                else:
                    log.warning("%s: the file is empty and left out", path)
    if not found:
        raise BardletError(
            f"{folder}: the folder has no text in it (.txt .md .jsonl, also .gz or .xz): name a file to read it "
            "whatever its suffix"
        )
    return sorted(found, key=lambda source: source.label)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror}): check that it is still there") from None


def _inner_suffix(path: Path) -> str:
    """The suffix without that of the compression: .jsonl for a.jsonl.xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in OPENERS else suffix


def _stem(path: Path) -> str:
    path = Path(path.resolve().name)
    while path.suffix.lower() in (*OPENERS, *TEXT_SUFFIXES):
        path = Path(path.stem)
    return re.sub(r"[^\w.-]+", "_", path.name).strip("_.") or "text"


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, NAMED, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


# ------------------------------------------------------------------------------------------ reading

Notice = Callable[[Source, str], None]


@contextlib.contextmanager
def _open_raw(path: Path, compressed: bool = False) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix unless `compressed`; every failure is one line."""
    opener = open if compressed else OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BardletError(f"{path}: its compression is damaged ({error}): get the file again") from None
    except PermissionError:
        raise BardletError(f"{path}: may not be read: change its permissions or copy it (chmod u+r)") from None
    except OSError as error:
        raise BardletError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_text(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """(place, text) of each document of a text file: one, unless `between` says what separates them."""
    with _open_raw(source.path) as file:
        raw = file.read()
    text = _mend(_decode(raw, source, notice), source, notice)
    del raw  # a big file would lie in memory twice while its documents are used
    if source.between is None:
        yield str(source.path), text
        return
    start = 0
    for number, match in enumerate(re.finditer(source.between, text), 1):
        yield f"{source.path}, document {number}", text[start : match.start()]
        start = match.end()
    yield f"{source.path}, last document", text[start:]


def _decode(raw: bytes, source: Source, notice: Notice) -> str:
    """The text of a whole file: UTF-8, or what its byte order mark says. NUL means that it is no text."""
    for mark, encoding, what in (
        (b"\xff\xfe\x00\x00", "utf-32", "UTF-32"),
        (b"\x00\x00\xfe\xff", "utf-32", "UTF-32"),
        (b"\xff\xfe", "utf-16", "UTF-16"),
        (b"\xfe\xff", "utf-16", "UTF-16"),
    ):
        if raw.startswith(mark):
            notice(source, f"is {what}, not UTF-8; read as {what}")
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise BardletError(
                    f"{source.path}: begins as {what} but byte {error.start} is not ({error.reason}): save it as UTF-8"
                ) from None
            if (nul := text.find("\0")) >= 0:
                raise BardletError(f"{source.path}: character {nul} is NUL, so this is no text: take it out")
            return text
    if (nul := raw.find(b"\0")) >= 0:
        raise BardletError(
            f"{source.path}: byte {nul} (line {raw.count(10, 0, nul) + 1}) is NUL, so this is binary, no text: "
            "take the file out, or save it as UTF-8 text"
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        notice(source, "begins with a byte order mark, which was dropped")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * raw.startswith(b"\xef\xbb\xbf")
        raise _not_utf8(source, offset, raw.count(10, 0, offset) + 1, raw[offset]) from None


def _not_utf8(source: Source, offset: int, line: int, byte: int) -> BardletError:
    return BardletError(
        f"{source.path}: byte {offset} (line {line}) is 0x{byte:02X}, which is no UTF-8: "
        "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, say)"
    )


def _mend(text: str, source: Source, notice: Notice) -> str:
    if "\r\n" in text:
        notice(source, "has Windows line ends (CR LF), read as LF")
        text = text.replace("\r\n", "\n")
    return text


def _read_jsonl(source: Source, notice: Notice) -> Iterator[tuple[str, str]]:
    """(place, text) of each line of a .jsonl file, one line in memory at a time."""
    offset = 0
    with _open_raw(source.path) as file:
        lines: Iterator[bytes] = iter(file)
        if file.peek(4)[:2] in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
            lines = io.BytesIO(_decode(file.read(), source, notice).encode())
        for number, line in enumerate(lines, 1):
            place = f"{source.path}, line {number}"
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                notice(source, "begins with a byte order mark, which was dropped")
                line, offset = line[3:], 3
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(source, offset + error.start, number, line[error.start]) from None
            offset += len(line)
            if decoded.strip():
                text = _mend(_text_of_line(decoded, place, source.field), source, notice)
                del line, decoded
                yield place, text


def _text_of_line(line: str, place: str, key: str) -> str:
    """The text of one JSON object."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = " (NUL: this is binary)" if "\0" in line else ""
        raise BardletError(
            f"{place}: is not JSON{column}{hint}: write one object a line, or rename the file to .txt"
        ) from None
    if not isinstance(value, dict):
        raise BardletError(f'{place}: is not an object like {{"{key}": "..."}}')
    if key not in value:
        strings = [k for k, v in value.items() if isinstance(v, str)]
        remedy = f"choose one with --field: {', '.join(strings)}" if strings else "and no field with text at all"
        raise BardletError(f'{place}: has no field "{key}"; {remedy}')
    text = value[key]
    if not isinstance(text, str):
        raise BardletError(f'{place}: "{key}" is {type(text).__name__}, not text: choose another field with --field')
    if "\\ud" in line or "\\uD" in line:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BardletError(
                f'{place}: character {error.start} of "{key}" is half of a surrogate pair: write it as UTF-8'
            ) from None
    return text


# ------------------------------------------------------------------------------------- embedded one


def python_docs() -> str:
    """The prose of Python's reference (pydoc_data.topics), one document; differs between versions of Python.

    Headings and paragraphs stay, one a line, each once (topics quote each other); code, grammar and tables go.
    """
    from pydoc_data.topics import topics

    kept: dict[str, None] = {}
    for _, topic in sorted(topics.items()):
        for block in re.split(r"\n\s*\n", topic.strip("\n")):
            lines = [line.rstrip() for line in block.split("\n")]
            if len(lines) == 2 and re.fullmatch(r"([*=\-~^#])\1+", lines[1]):
                del lines[1]  # the line under a heading
            elif not _is_prose(lines):
                continue
            kept[" ".join(" ".join(lines).split())] = None
    return "\n\n".join(kept) + "\n"


def _is_prose(lines: list[str]) -> bool:
    """Whether a block of the reference is a sentence rather than code, grammar or a table."""
    text = " ".join(line.strip() for line in lines)
    text = re.sub(r"^(\* |\d+\. |\[\d+\] )", "", text)
    table = any(re.search(r"^\s*[+|>]|\S {3,}\S", line) for line in lines)
    sentence = len(text) > 40 and text[0].isalpha() and text[-1] in ".:)" and " " in text[:25]
    body = lines[0].startswith("   ") and text[0].islower()  # code that reads like a sentence
    return sentence and "::=" not in text and not table and not body
