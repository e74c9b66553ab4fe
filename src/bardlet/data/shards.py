"""A text as token shards on disk (`data/shard_file.py`).

They are built once per text and tokenizer, in a temporary folder that is renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bardlet import tokenizer as tokenization
from bardlet.data import duplicates, vocabulary
from bardlet.data.corpus import Corpus
from bardlet.data.named import Progress, cache_folder
from bardlet.data.shard_file import open_shard, write_shard
from bardlet.errors import BardletError
from bardlet.runtime import manifest
from bardlet.tokenizer import SEPARATOR, Tokenizer

log = logging.getLogger("bardlet")

Built = TypeVar("Built")

VERSION = 3
WINDOW = {"char": 64, "byte": 64, "bpe": 16}
"""Tokens of a passage that is long enough to be a copy if it occurs twice: about a dozen words."""


# ------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class TextDataset:
    """A text as tokens. train, val: (N,) uint16 or uint32, memory-mapped and read-only.

    reason: why this tokenizer was chosen. *_chars, *_bytes: length of each split of the text, in characters and
    in bytes of UTF-8. documents: number of documents. skipped: number of characters left out because the
    tokenizer does not know them (skip_unseen only). duplicated: share of the training split that repeats an
    earlier passage; leaked: share of the validation split that also occurs in the training split; both in
    passages of WINDOW tokens. dev_start: start of the development split in `train`, None for the last tenth of the
    tokens. folder: of the shards and tokenizer.json.
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
    dev_start: int | None = None


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: str | Tokenizer = "auto",
    vocab_size: int | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
    skip_unseen: bool = False,
    val_part: str = "val",
    distinct: int | None = None,
) -> TextDataset:
    """Return the token shards of a corpus: from the cache if they are there and intact, else build them.

    tokenizer: "auto", "char", "byte", "bpe", or a Tokenizer to use as it is. vocab_size: for bpe; None chooses it
    by the size of the text. cache: folder for the shards, by default $BARDLET_CACHE or the user's cache folder.
    skip_unseen: leave out and count the characters that a given char tokenizer does not know, instead of stopping
    at the first. val_part: "dev" if the development split is in use; then bpe is not trained on it. distinct: maximum
    total size of the distinct words to train bpe on, in bytes. Memory holds a few blocks of the text. BardletError if
    the text is too short or the cache is not writable.
    """
    given = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if given and (cached := _find_cached(corpus, given, cache)):
        return replace(cached, tokenizer=given)  # with its own chat template and ids that end a text
    end = f" {given.eos}" if given and given.eos != SEPARATOR else ""
    spec = f"given {given.hash} {skip_unseen}{end}" if given else f"{_checked(tokenizer, vocab_size)} {vocab_size}"
    dev = val_part == "dev" and tokenizer in ("auto", "bpe")
    spec += " dev" * dev + f" {distinct}" * (distinct is not None and given is None)
    key = hashlib.sha256(f"{corpus.hash} {spec} {VERSION}".encode()).hexdigest()
    root = (cache or cache_folder()) / "tokens"
    folder = root / f"{corpus.name[:60]}-{key[:16]}"
    job = _Job(corpus, tokenizer, vocab_size, skip_unseen, progress, cache, dev, distinct)
    dataset = build_or_read(folder, lambda target: _build(job, target), lambda finished: _open(finished, corpus))
    return replace(dataset, tokenizer=given) if given else dataset


@dataclass(frozen=True)
class _Job:
    """The arguments of `tokenize_corpus`."""

    corpus: Corpus
    tokenizer: str | Tokenizer
    vocab_size: int | None
    skip_unseen: bool
    progress: Progress | None
    cache: Path | None
    dev: bool
    """Train bpe without the development split."""
    distinct: int | None


DAMAGE = (OSError, ValueError, KeyError, TypeError, BardletError)
"""The exceptions of a token folder that cannot be used."""


def build_or_read(folder: Path, build: Callable[[Path], None], read: Callable[[Path], Built]) -> Built:
    """Return `read(folder)`; if the folder is missing or damaged, first `build` its content in an empty folder.

    BardletError if it cannot be written. A kill leaves nothing half-written; if another process finishes first, its
    folder is used.
    """
    if folder.exists():
        try:
            return read(folder)
        except DAMAGE as error:
            log.warning("%s; rebuilding the tokens", error)
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        with tempfile.TemporaryDirectory(dir=root, prefix=".making-", ignore_cleanup_errors=True) as scratch:
            target = Path(scratch) / "whole"
            target.mkdir()
            build(target)
            return _move_into_place(target, folder, read)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BardletError(
            f"{root}: cannot write tokens here ({reason}); free some space, or set BARDLET_CACHE to another folder"
        ) from None


def _find_cached(corpus: Corpus, tokenizer: Tokenizer, cache: Path | None) -> TextDataset | None:
    """Return cached shards of this text and tokenizer, even if the tokenizer was not given but trained for them."""
    for path in sorted(((cache or cache_folder()) / "tokens").glob(f"{glob.escape(corpus.name[:60])}-*/prepared.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, BardletError):
            metadata = json.loads(path.read_text(encoding="utf-8"))
            if metadata["text"] == corpus.hash and not metadata["skipped"]:
                dataset = _open(path.parent, corpus)
                if (dataset.tokenizer.hash, dataset.tokenizer.eos) == (tokenizer.hash, tokenizer.eos):
                    return dataset
    return None


def _checked(kind: str | Tokenizer, vocab_size: int | None) -> str:
    if kind not in tokenization.KINDS:
        raise BardletError(f"--tokenizer {kind}: no such tokenizer; choose from {', '.join(tokenization.KINDS)}")
    if vocab_size is not None and kind in ("char", "byte"):
        raise BardletError(f"--vocab-size is for bpe; drop it with --tokenizer {kind}")
    return str(kind)


def _build(job: _Job, folder: Path) -> None:
    """Write the tokenizer, both shards and prepared.json into an empty folder."""
    corpus, progress, total = job.corpus, job.progress, None
    if isinstance(job.tokenizer, Tokenizer):
        tokenizer, reason = job.tokenizer, f"{job.tokenizer.kind}: the tokenizer that came with the model"
    else:
        tokenizer, reason, total = vocabulary.train_tokenizer(
            corpus, job.tokenizer, job.vocab_size, progress, job.cache, job.dev, job.distinct)
    metadata: dict[str, Any] = {"reason": reason, "documents": corpus.count, "skipped": 0, "text": corpus.hash}
    tokens: dict[str, int] = {}
    for part in ("train", "val"):
        before = metadata.get("train_chars", 0)
        report = (lambda done, start=before: progress("tokenizing", start + done, total)) if progress else None
        documents = _cleaned(corpus, part, tokenizer, job.skip_unseen, metadata)
        counts = write_shard(folder / f"{part}.npy", documents, tokenizer, corpus.needs_separator, report,
                             corpus.location)
        metadata[f"{part}_chars"], metadata[f"{part}_bytes"], tokens[part] = counts
    if min(tokens.values()) < 2:
        characters = metadata["train_chars"] + metadata["val_chars"]
        raise BardletError(too_short(corpus.name, characters, " that the tokenizer knows" * bool(metadata["skipped"])))
    tokenizer.save(folder)
    train, val = (open_shard(folder / f"{part}.npy") for part in ("train", "val"))
    shares = duplicates.overlap(train, val, WINDOW["bpe" if tokenizer.kind == "other" else tokenizer.kind])
    metadata["duplicated"], metadata["leaked"] = (round(share, 4) for share in shares)
    if job.dev and tokenizer.kind == "bpe":
        metadata["dev_start"] = vocabulary.dev_start(corpus, train, tokenizer, metadata["train_chars"])
    if corpus.notices:
        metadata["notices"] = list(corpus.notices)
    (folder / "prepared.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    names = ["train.npy", "val.npy", "prepared.json", "tokenizer.json", "tokenizer_config.json"]
    manifest.write_manifest(folder, names)


def too_short(name: str, characters: int, which: str = "") -> str:
    """Return the message for a text with too few characters."""
    return f"{name}: the text has {characters:,} character{'s' * (characters != 1)}{which}; use 10,000 or more"


def _cleaned(
    corpus: Corpus, part: str, tokenizer: Tokenizer, skip_unseen: bool, metadata: dict[str, Any]
) -> Iterator[tuple[int, Iterator[str]]]:
    """Yield (number, text in blocks) of documents; skip_unseen: drop and count unknown characters in `metadata`."""

    def known(blocks: Iterator[str]) -> Iterator[str]:
        for block in blocks:
            text, skipped = tokenizer.drop_unseen(block)
            metadata["skipped"] += skipped
            yield text

    for number, blocks in corpus.blocks(part):
        yield number, known(blocks) if skip_unseen else blocks


def check(folder: Path) -> None:
    """Raise BardletError if a token folder changed since it was written: it would silently train another model."""
    if not (folder / manifest.MANIFEST).exists():
        raise BardletError(f"{folder}: incomplete, or from an earlier version")
    if damage := manifest.damaged_files(folder):
        raise BardletError(damage)


def _open(folder: Path, corpus: Corpus) -> TextDataset:
    """Return the dataset in a folder, and repeat what was repaired or is odd in its text."""
    check(folder)
    tokenizer = tokenization.load(folder)
    metadata = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    metadata.pop("text")
    notices = metadata.pop("notices", ())
    train, val = (open_shard(folder / f"{part}.npy") for part in ("train", "val"))
    dataset = TextDataset(train=train, val=val, tokenizer=tokenizer, folder=folder, **metadata)
    for line in notices:
        corpus.announce(line)
    return dataset


def _move_into_place(finished: Path, folder: Path, read: Callable[[Path], Built]) -> Built:
    """Rename a finished folder to `folder`, and read it. If another process was faster, read its folder instead."""
    for _ in range(3):
        with contextlib.suppress(OSError):
            os.rename(finished, folder)
            return read(folder)
        try:
            return read(folder)
        except DAMAGE:  # move the damaged folder out of the way
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, finished.parent / f"damaged-{time.time_ns()}")
    raise BardletError(f"{folder}: cannot be replaced; delete it")


def _remove_stale(root: Path) -> None:
    """Remove temporary folders of processes that were killed at least a day ago."""
    for leftover in root.glob(".making-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 86_400:
                shutil.rmtree(leftover, ignore_errors=True)
