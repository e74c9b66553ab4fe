"""Sentence pairs as tokens and as batches.

Each line becomes its tokens and a separator. A batch holds pairs of similar lengths, so there is little padding, and
about the same number of tokens whatever the lengths. As everywhere, the batch is a pure function of (seed, step).

Shapes: B rows of a batch, S tokens of a source, T tokens of a target, N pairs. Padding is on the right.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bardlet import tokenizer as tokenization
from bardlet.data import shard_file, shards, windows
from bardlet.data.batch import Batch
from bardlet.data.bitext import ParallelCorpus
from bardlet.data.named import cache_folder
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.ops.cross_entropy import IGNORE
from bardlet.runtime import manifest
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

VERSION = 1
SIDES = ("source", "target")


# ------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenizedLines:
    """Lines as tokens: line i is tokens[ends[i - 1]:ends[i]], the separator last. ends: (N,) int64."""

    tokens: np.ndarray
    ends: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of the first token of each line: (N,) int64."""
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each line, including its separator: (N,) int64."""
        return self.ends - self.starts

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, number: int) -> np.ndarray:
        """Return the ids of a line, the separator last: (T,)."""
        return self.tokens[self.starts[number] : self.ends[number]]

    def part(self, span: slice) -> TokenizedLines:
        """Return the lines of a slice without step."""
        starts = self.starts[span]
        first = int(starts[0]) if len(starts) else 0
        ends = self.ends[span]
        return TokenizedLines(self.tokens[first : int(ends[-1]) if len(ends) else 0], ends - first)

    def rows(self, indices: np.ndarray, width: int, fill: int) -> np.ndarray:
        """Return the lines `indices` (B,), padded to `width` with `fill` on the right: (B, width) int64."""
        position = self.starts[indices, None] + np.arange(width)
        inside = np.arange(width) < self.lengths[indices, None]
        return np.where(inside, self.tokens[np.minimum(position, len(self.tokens) - 1)], fill).astype(np.int64)


@dataclass(frozen=True)
class TokenizedPairs:
    """Pairs as tokens. train, val: (source, target). reason: why this tokenizer was chosen.

    leaked: share of the validation pairs whose source also occurs in the training split. folder: where they are cached.
    """

    train: tuple[TokenizedLines, TokenizedLines]
    val: tuple[TokenizedLines, TokenizedLines]
    tokenizer: Tokenizer
    reason: str
    leaked: float
    folder: Path


def tokenize_pairs(corpus: ParallelCorpus, tokenizer: str | Tokenizer = "auto", vocab_size: int | None = None,
                   progress: Progress | None = None, cache: Path | None = None) -> TokenizedPairs:
    """Return the pairs as tokens: from the cache if they are there and intact, else tokenize them.

    Args:
        tokenizer: "auto" or "bpe" trains one BPE for both languages on the training split; or a Tokenizer to use.
        vocab_size: of a new tokenizer; None chooses it by the length of the text.

    Raises:
        BardletError: too few pairs, a tokenizer without separator or padding token, or a cache that is not writable.
    """
    spec = tokenizer.hash if isinstance(tokenizer, Tokenizer) else f"bpe {vocab_size} {corpus.lowercase}"
    key = hashlib.sha256(f"{corpus.hash} {corpus.val is None} {spec} {VERSION}".encode()).hexdigest()
    root = (cache or cache_folder()) / "tokens"
    folder = root / f"{corpus.name[:60]}-{key[:16]}"

    def build(target: Path) -> None:
        _build(corpus, tokenizer, vocab_size, target, progress)

    return shards.build_or_read(folder, build, _open)


def _build(corpus: ParallelCorpus, spec: str | Tokenizer, vocab_size: int | None, folder: Path,
           progress: Progress | None) -> None:
    """Write the tokenizer, four shards and prepared.json into an empty folder."""
    parts = {part: list(corpus.pairs(part)) for part in ("train", "val")}
    for part, pairs in parts.items():
        if not pairs:
            name = "training" if part == "train" else "validation"
            raise BardletError(f"{corpus.name}: the {name} split has no pairs; check that its files have text")
    if isinstance(spec, Tokenizer):
        tokenizer, reason = spec, f"{spec.kind}: the tokenizer that came with the model"
        if tokenizer.eos_id is None or tokenizer.pad_id is None:
            raise BardletError("the model's tokenizer has no end-of-line or no padding token, and translation needs "
                               "both; use a model with a bpe tokenizer of bardlet")
    else:
        characters = sum(map(len, (line for pair in parts["train"] for line in pair)))
        # twice the size for a single text: there are two languages, and short lines justify a larger head (LOG.md)
        size = vocab_size or 2 * tokenization.suggest_vocab_size(characters, 0)
        if progress:
            progress("training the bpe tokenizer", 0, None)
        tokenizer = tokenization.train_bpe((line for pair in parts["train"] for line in pair), size, corpus.lowercase,
                                           True)
        reason = (f"bpe: {tokenizer.vocab_size:,} tokens for both languages"
                  + (", lower case" if corpus.lowercase else ""))
    tokenizer.save(folder)
    for part, pairs in parts.items():
        for side, name in enumerate(SIDES):
            documents = ((f"{corpus.name}, {part}, {name}", (pair[side],)) for pair in pairs)
            shard_file.write_shard(folder / f"{part}.{name}.npy", documents, tokenizer, separate=True)
    train_sources = {source for source, _ in parts["train"]}
    leaked = sum(source in train_sources for source, _ in parts["val"]) / len(parts["val"])
    metadata = {"reason": reason, "leaked": round(leaked, 4)}
    (folder / "prepared.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    names = [f"{part}.{name}.npy" for part in parts for name in SIDES]
    manifest.write_manifest(folder, [*names, "prepared.json", "tokenizer.json", "tokenizer_config.json"])


def _open(folder: Path) -> TokenizedPairs:
    shards.check(folder)
    tokenizer = tokenization.load(folder)
    metadata = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))

    def lines(part: str, name: str) -> TokenizedLines:
        tokens = shard_file.open_shard(folder / f"{part}.{name}.npy")
        return TokenizedLines(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)

    train, val = (tuple(lines(part, name) for name in SIDES) for part in ("train", "val"))
    if any(len(source) != len(target) for source, target in (train, val)):
        raise BardletError(f"{folder}: source and target have different numbers of lines")
    return TokenizedPairs(train=train, val=val, tokenizer=tokenizer, folder=folder, **metadata)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ batches


def bucket(length: np.ndarray) -> np.ndarray:
    """Return the bucket width of each length: even up to 64, then in steps of a 32nd to a 16th. int64."""
    step = 2 ** np.maximum(1, np.ceil(np.log2(np.maximum(length, 1))).astype(np.int64) - 5)
    return -(-length // step) * step


class PairBatches:
    """Batches of pairs of similar lengths. Every epoch has each pair once, and the same number of batches.

    A pair is as wide as its longer side. Each width bucket is shuffled and cut into batches; the remainder joins the
    next wider bucket, so at most one batch of an epoch is small. The batches come in random order.
    """

    def __init__(self, lines: tuple[TokenizedLines, TokenizedLines], format: PairFormat, batch_tokens: int, seed: int,
                 multiple: int = 1) -> None:
        """Leave out pairs wider than format.longest.

        batch_tokens: maximum of rows times width of a batch.
        multiple: pad the rows of a batch to a multiple of this, with rows that have no targets.
        """
        self.lines, self.format, self.seed, self.multiple = lines, format, seed, multiple
        length = format.width(lines[0].lengths, lines[1].lengths)
        self.kept = np.flatnonzero(length <= format.longest)
        self.left_out = len(length) - len(self.kept)
        if not len(self.kept):
            raise BardletError(f"all {len(length):,} pairs are longer than --block-size {format.longest}; "
                               "use a larger one")
        self.width = np.minimum(bucket(length[self.kept]), format.longest)
        self.buckets = [(int(w), np.flatnonzero(self.width == w)) for w in np.unique(self.width)]
        self.rows = {w: max(1, batch_tokens // w) for w, _ in self.buckets}
        self._epochs: dict[int, list[np.ndarray]] = {}
        self.batches_per_epoch = len(self.epoch(0))

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return the batches of an epoch in order: the indices of each batch's pairs, (B,) int64."""
        if number not in self._epochs:
            random = np.random.default_rng([self.seed % 2**64, number])
            batches: list[np.ndarray] = []
            rest = np.zeros(0, np.int64)
            for width, members in self.buckets:
                pool, rows = np.concatenate((rest, random.permutation(members))), self.rows[width]
                whole = len(pool) // rows * rows
                batches += np.split(pool[:whole], whole // rows) if whole else []
                rest = pool[whole:]
            if len(rest):
                batches.append(rest)
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[number] = [self.kept[batches[i]] for i in random.permutation(len(batches))]
        return self._epochs[number]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        return self.format.batch(self.lines, self.epoch(epoch)[within], self.multiple)

    def widest(self) -> Batch:
        """Return a batch as large as any can be: all rows of the widest bucket, without padding."""
        width = self.buckets[-1][0]
        rows = -(-self.rows[width] // self.multiple) * self.multiple
        ids, length = torch.zeros((rows, width), dtype=torch.int64), torch.full((rows,), width)
        extra = {"prefix": torch.ones_like(length)} if self.format.joined else {"source": ids, "source_length": length}
        return {**extra, "idx": ids, "target": ids}

    def describe_batch(self, step: int) -> str:
        """Return the epoch, batch and first pairs of a step, for messages."""
        epoch, within = divmod(step, self.batches_per_epoch)
        pairs = self.epoch(epoch)[within] + 1
        return (f"{windows.epoch_and_batch(step, self.batches_per_epoch)}, pairs "
                f"{', '.join(map(str, pairs[:5]))}{' ...' if len(pairs) > 5 else ''}")


@dataclass(frozen=True)
class PairFormat:
    """Layout of pairs as the tensors of a batch.

    pad: padding id; targets are IGNORE there. longest: maximum width of a row. joined: False keeps source and target
    in tensors of their own, for an encoder-decoder; True puts both into one row with a separator between them, for a
    decoder-only model.
    """

    pad: int
    longest: int
    joined: bool = False

    def width(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return the width of pairs whose sides have these lengths."""
        return source + target - 1 if self.joined else np.maximum(source, target)

    def padded_width(self, lengths: np.ndarray) -> int:
        """Return the common width of rows of these lengths: the bucket of the longest, at most `longest`."""
        return min(self.longest, int(bucket(lengths.max()[None])[0]))

    def batch(self, lines: tuple[TokenizedLines, TokenizedLines], indices: np.ndarray, multiple: int = 1) -> Batch:
        """Return the pairs `indices` (B,) as a batch; all tensors are int64.

        Separate: `source` (B, S), `source_length` (B,), `target` (B, T), and `idx` (B, T), the target shifted right
        behind a padding token, which starts the decoder. Joined: `idx`, `target` (B, T), and `prefix` (B,), the length
        of the source with its separator.
        """
        rows = len(indices)
        indices = np.concatenate((indices, np.repeat(indices[:1], -rows % multiple)))
        source, target = lines
        source_length, length = source.lengths[indices], target.lengths[indices]
        if self.joined:
            length = self.width(source_length, length)
            T = self.padded_width(length)
            both = self._join(lines, indices, T + 1)
            inputs = {"idx": both[:, :-1], "prefix": source_length}
            targets = np.where(np.arange(1, T + 1) < source_length[:, None], IGNORE, both[:, 1:])
        else:
            T = self.padded_width(length)
            targets = target.rows(indices, T, self.pad)
            inputs = {"source": source.rows(indices, self.padded_width(source_length), self.pad),
                      "source_length": source_length,
                      "idx": np.concatenate((np.full((len(indices), 1), self.pad), targets[:, :-1]), axis=1)}
        targets = np.where(np.arange(T) < length[:, None], targets, IGNORE)
        targets[rows:] = IGNORE
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in (*inputs.items(), ("target", targets))}

    def _join(self, lines: tuple[TokenizedLines, TokenizedLines], indices: np.ndarray, width: int) -> np.ndarray:
        """Return each source followed by its target: (B, width)."""
        source, target = (side.rows(indices, width, self.pad) for side in lines)
        source_length = lines[0].lengths[indices, None]
        position = np.arange(width) - source_length
        shifted = np.take_along_axis(target, np.clip(position, 0, width - 1), axis=1)
        return np.where(position < 0, source, shifted)


def validation_batches(lines: tuple[TokenizedLines, TokenizedLines], format: PairFormat,
                       batch_tokens: int) -> list[Batch]:
    """Return each validation pair that is at most format.longest wide once, shortest first, in batches."""
    length = format.width(lines[0].lengths, lines[1].lengths)
    order = np.argsort(length, kind="stable")
    order = order[length[order] <= format.longest]
    batches, start = [], 0
    while start < len(order):
        rows = max(1, batch_tokens // format.padded_width(length[order[start : start + 1]]))  # the last may be wider
        batches.append(format.batch(lines, order[start : start + rows]))
        start += rows
    return batches
