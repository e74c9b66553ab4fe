"""Documents to token shards on disk.

A shard is a one-dimensional array in NumPy's own format, the ids in 16 or 32 bits each. It is memory-mapped, so that a
text may be larger than memory. Shards are built once for each text and tokenizer, in a temporary folder that is renamed
when it is whole.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from bardlet import tokenizer as tokenization
from bardlet.data import duplicates
from bardlet.data.corpus import Corpus, cache_folder
from bardlet.data.statistics import measure_corpus
from bardlet.errors import BardletError
from bardlet.runtime import manifest
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

Progress = Callable[[str, int, int | None], None]
Built = TypeVar("Built")

VERSION = 1
WINDOW = {"char": 64, "byte": 64, "bpe": 16}
"""Tokens of a passage long enough that it is a copy where it occurs twice: some dozen words."""
BEFORE = struct.Struct("<8sIIQ32s72x")
"""The header of a shard of bardlet 0.2: "bardlet", 1, bytes per token, number of tokens, hash of the tokenizer."""


# ------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class TextDataset:
    """A text as tokens. train, val: (N,) uint16 or uint32, memory-mapped and read-only.

    reason: why this tokenizer, a sentence. *_chars, *_bytes: length of the parts of the text, in characters
    and in bytes of UTF-8. documents: how many there are. skipped: characters left out since the tokenizer
    has never seen them (skip_unseen only). duplicated: the share of the training part that repeats what
    stands before it; leaked: the share of the validation part that stands in the training part; both in
    passages of WINDOW tokens. folder: where the shards and tokenizer.json lie.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    reason: str
    train_chars: int
    val_chars: int
    train_bytes: int
    val_bytes: int
    documents: int
    skipped: int
    folder: Path
    duplicated: float = 0.0
    leaked: float = 0.0


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: str | Tokenizer = "auto",
    vocab_size: int | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
    skip_unseen: bool = False,
) -> TextDataset:
    """The token shards of a corpus: from the cache when they are there and whole, else built.

    tokenizer: "auto", "char", "byte", "bpe", or a Tokenizer from elsewhere, which then is used as it is.
    vocab_size: for bpe; None sizes it to the text. cache: where shards are kept, by default below
    $BARDLET_CACHE or the user's cache folder. skip_unseen: leave out and count characters that a given
    char tokenizer has never seen, instead of stopping at the first. Never more than one document and some
    pieces of it are in memory. BardletError when the text is too short, or the cache cannot be written.
    """
    given = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if given and (known := _find_cached(corpus, given, cache)):
        return known
    spec = f"given {given.hash} {skip_unseen}" if given else f"{_checked(tokenizer, vocab_size)} {vocab_size}"
    key = hashlib.sha256(f"{corpus.hash} {spec} {VERSION}".encode()).hexdigest()
    root = (cache or cache_folder()) / "tokens"
    folder = root / f"{corpus.name[:60]}-{key[:16]}"
    job = _Job(corpus, tokenizer, vocab_size, skip_unseen, progress, cache)
    return build_or_read(folder, lambda whole: _build(job, whole), _open)


@dataclass(frozen=True)
class _Job:
    """What `prepare` was asked for."""

    corpus: Corpus
    tokenizer: str | Tokenizer
    vocab_size: int | None
    skip_unseen: bool
    progress: Progress | None
    cache: Path | None


DAMAGE = (OSError, ValueError, KeyError, TypeError, BardletError)
"""What is raised where a folder of tokens cannot be used."""


def build_or_read(folder: Path, build: Callable[[Path], None], read: Callable[[Path], Built]) -> Built:
    """What `read` finds in `folder`; where it is not there, or damaged, `build` makes it in an empty folder first.

    BardletError where it cannot be written. A kill leaves no half of it, and a process that was faster is believed.
    """
    if folder.exists():
        try:
            return read(folder)
        except DAMAGE as error:
            log.warning("%s; the tokens are built again", error)
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with tempfile.TemporaryDirectory(dir=root, prefix=".making-", ignore_cleanup_errors=True) as made:
            whole = Path(made) / "whole"
            whole.mkdir()
            build(whole)
            return _place(whole, folder, read)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BardletError(
            f"{root}: tokens cannot be written there ({reason}): make room, or name another place with BARDLET_CACHE"
        ) from None


def _find_cached(corpus: Corpus, tokenizer: Tokenizer, cache: Path | None) -> TextDataset | None:
    """The shards of this text by this very tokenizer, whatever it was called when they were made."""
    for path in sorted(((cache or cache_folder()) / "tokens").glob(f"{glob.escape(corpus.name[:60])}-*/prepared.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, BardletError):
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["text"] == corpus.hash and not facts["skipped"]:
                ready = _open(path.parent)
                if ready.tokenizer.hash == tokenizer.hash:
                    return ready
    return None


def _checked(kind: str | Tokenizer, vocab_size: int | None) -> str:
    if kind not in tokenization.KINDS:
        raise BardletError(f"--tokenizer {kind}: there is no such tokenizer; choose {', '.join(tokenization.KINDS)}")
    if vocab_size is not None and kind in ("char", "byte"):
        raise BardletError(f"--vocab-size belongs to bpe; the text itself decides it for --tokenizer {kind}")
    return str(kind)


def _build(job: _Job, folder: Path) -> None:
    """Write tokenizer, both shards and prepared.json into an empty folder."""
    corpus, progress, total = job.corpus, job.progress, None
    if isinstance(job.tokenizer, Tokenizer):
        chosen, reason = job.tokenizer, f"{job.tokenizer.kind}: the tokenizer that came with the model"
    else:
        chosen, reason, total = _make_tokenizer(job, job.tokenizer)
    facts: dict[str, Any] = {"reason": reason, "documents": 0, "skipped": 0, "text": corpus.hash}
    for part in ("train", "val"):
        before = facts.get("train_chars", 0)
        tell = (lambda done, start=before: progress("tokens", start + done, total)) if progress else None
        documents = _cleaned(corpus, part, chosen, job.skip_unseen, facts)
        counts = write_shard(folder / f"{part}.npy", documents, chosen, corpus.several, tell)
        facts[f"{part}_chars"], facts[f"{part}_bytes"], tokens = counts
        if tokens < 2:
            raise BardletError(
                f"{corpus.name}: its {'training' if part == 'train' else 'validation'} part has {tokens} tokens, "
                "and a model needs 2 to learn from one: give it a longer text (some 10,000 characters or more)"
            )
    # fewer than 20 documents are in both parts, more in one of them
    facts["documents"] = corpus.count
    chosen.save(folder)
    train, val = (open_shard(folder / f"{part}.npy") for part in ("train", "val"))
    shares = duplicates.overlap(train, val, WINDOW["bpe" if chosen.kind == "other" else chosen.kind])
    facts["duplicated"], facts["leaked"] = (round(share, 4) for share in shares)
    (folder / "prepared.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    manifest.write_manifest(folder, ["train.npy", "val.npy", "prepared.json", "tokenizer.json", "tokenizer_config.json"])


def _make_tokenizer(job: _Job, kind: str) -> tuple[Tokenizer, str, int | None]:
    """(tokenizer, reason, characters of the text or None where nobody counted them)."""
    corpus, vocab_size, progress = job.corpus, job.vocab_size, job.progress
    if kind == "byte":
        return tokenization.train_byte(corpus.several), "byte: as asked for, every byte is a token", None
    seen = measure_corpus(corpus, progress, job.cache)
    characters, alphabet = seen.characters, set(seen.alphabet)
    if kind == "auto" and vocab_size is None:
        kind, vocab_size, reason = tokenization.choose_kind(characters, len(alphabet))
    else:
        kind = "bpe" if kind == "auto" else kind
        vocab_size = vocab_size or tokenization.suggest_vocab_size(characters, len(alphabet))
        size = f"{len(alphabet)} different characters" if kind == "char" else f"{vocab_size:,} tokens"
        reason = f"{kind}: as asked for, {size}"
    if kind == "char":
        return tokenization.train_char(alphabet, corpus.several), reason, characters
    if kind == "byte":
        return tokenization.train_byte(corpus.several), reason, characters
    if progress:
        progress("train bpe", 0, None)
    trained = tokenization.train_bpe(corpus.documents("train"), int(vocab_size or 0))
    return trained, reason + warn_small_vocabulary(trained, vocab_size), characters


def warn_small_vocabulary(trained: Tokenizer, wanted: int | None) -> str:
    """What is added to the reason where a text has fewer pieces than were wanted; mostly nothing."""
    few = trained.vocab_size < (wanted or 0)
    return f" (the text has only enough repetition for {trained.vocab_size:,})" if few else ""


def _cleaned(
    corpus: Corpus, part: str, tokenizer: Tokenizer, skip_unseen: bool, facts: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(place, text) of the documents; unseen characters are dropped and counted when that is wanted."""
    for place, text in corpus.labelled(part):
        if skip_unseen:
            text, skipped = tokenizer.drop_unseen(text)
            facts["skipped"] += skipped
        yield place, text


def write_shard(
    path: Path,
    documents: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    several: bool,
    tell: Callable[[int], None] | None = None,
) -> tuple[int, int, int]:
    """Write (place, text) as one shard, a separator after each where there are several: (chars, bytes, tokens)."""
    separator = None
    if several and tokenizer.eos_id is not None:
        separator = np.array([tokenizer.eos_id], tokenizer.dtype).tobytes()
    characters = text_bytes = tokens = 0
    with open(path, "wb") as file:
        begins = _write_header(file, tokenizer.dtype, 0)
        for place, text in documents:
            try:
                for number, ids in enumerate(tokenizer.encode_pieces(text), 1):
                    file.write(ids.tobytes())
                    tokens += len(ids)
                    if tell:  # about so many characters make one part
                        tell(characters + min(number * tokenization.PIECE * tokenization.BATCH, len(text)))
            except BardletError as error:
                raise BardletError(f"{place}: {error}") from None
            if separator:
                file.write(separator)
                tokens += 1
            characters += len(text)
            text_bytes += _utf8_length(text)
        file.seek(0)
        if _write_header(file, tokenizer.dtype, tokens) != begins:  # NumPy leaves room for a number that grows
            raise BardletError(f"{path}: internal error: the header of {tokens:,} tokens has another length")
        file.flush()
        os.fsync(file.fileno())
    return characters, text_bytes, tokens


def _utf8_length(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(len(text[i : i + (1 << 20)].encode()) for i in range(0, len(text), 1 << 20))


def _write_header(file: BinaryIO, dtype: np.dtype[Any], count: int) -> int:
    """Write the header of an array of `count` numbers; return where they begin."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def open_shard(path: Path) -> np.ndarray:
    """The ids of the shard NAME.npy, (N,), memory-mapped and read-only; or of NAME.bin, as bardlet 0.2 wrote it.

    Raises:
        BardletError: what is wrong with the file.
    """
    if not path.exists() and path.with_suffix(".bin").exists():
        return _open_version_1(path.with_suffix(".bin"))
    ids = read_array(path)
    if ids.ndim != 1 or ids.dtype.str not in ("<u2", "<u4"):
        raise BardletError(f"{path}: holds no token ids")
    return ids


def read_array(path: Path) -> np.ndarray:
    """An array in NumPy's format, memory-mapped and read-only. BardletError where the file is none."""
    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OverflowError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise BardletError(f"{path}: is no array of NumPy's ({str(error).splitlines()[0]})") from None
    if not isinstance(found, np.ndarray):  # a zip file of several
        raise BardletError(f"{path}: is no array of NumPy's")
    return found


def _open_version_1(path: Path) -> np.ndarray:
    """The ids of a shard of bardlet 0.2."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(BEFORE.size)
    if len(head) < BEFORE.size:
        raise BardletError(f"{path}: ends in its header")
    magic, version, width, count, _ = BEFORE.unpack(head)
    if magic != b"bardlet\0" or version != 1 or width not in (2, 4):
        raise BardletError(f"{path}: is no shard of bardlet's")
    if size != BEFORE.size + width * count:
        raise BardletError(f"{path}: has {size} bytes, not {BEFORE.size + width * count}")
    return np.memmap(path, f"<u{width}", "r", BEFORE.size, (count,)) if count else np.zeros(0, f"<u{width}")


def check(folder: Path) -> None:
    """BardletError where a folder of tokens is not what was written: it would train another model, and nobody knew."""
    if not (folder / manifest.MANIFEST).exists():
        raise BardletError(f"{folder}: made by an earlier version, or not whole")
    if damage := manifest.damaged_files(folder):
        raise BardletError(damage)


def _open(folder: Path) -> TextDataset:
    check(folder)
    tokenizer = tokenization.load(folder)
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    facts.pop("text")
    train, val = (open_shard(folder / f"{part}.npy") for part in ("train", "val"))
    return TextDataset(train=train, val=val, tokenizer=tokenizer, folder=folder, **facts)


def _place(whole: Path, folder: Path, read: Callable[[Path], Built]) -> Built:
    """Rename a finished folder to its place. When another process was first, its work is used."""
    for _ in range(3):
        with contextlib.suppress(OSError):
            os.rename(whole, folder)
            return read(folder)
        try:
            return read(folder)
        except DAMAGE:  # what is there is damaged: out of the way
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, whole.parent / f"damaged-{time.time_ns()}")
    raise BardletError(f"{folder}: cannot be replaced: remove it by hand")


def _sweep(root: Path) -> None:
    """Remove what processes that were killed a day ago or earlier left behind."""
    for left in root.glob(".making-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)
