"""Sentence pairs as tokens and as batches.

Each line is a sequence of tokens with the separator at its end. A batch holds pairs of similar lengths, so that little
of it is padding, and about the same number of tokens whatever the lengths; which pairs a step has is a function of seed
and step, as everywhere.

B rows of a batch, S tokens of a source, T tokens of a target, N pairs. Padding is on the right.
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
from bardlet.data import shards, windows
from bardlet.data.batch import Batch
from bardlet.data.bitext import ParallelCorpus
from bardlet.data.corpus import cache_folder
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
        """Where each line begins: (N,) int64."""
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """How many tokens each line has, with its separator: (N,) int64."""
        return self.ends - self.starts

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, number: int) -> np.ndarray:
        """The ids of a line, its separator last: (T,)."""
        return self.tokens[self.starts[number] : self.ends[number]]

    def part(self, which: slice) -> TokenizedLines:
        """The lines of a slice without step."""
        begins = self.starts[which]
        first = int(begins[0]) if len(begins) else 0
        ends = self.ends[which]
        return TokenizedLines(self.tokens[first : int(ends[-1]) if len(ends) else 0], ends - first)

    def rows(self, which: np.ndarray, width: int, fill: int) -> np.ndarray:
        """The lines `which` (B,), filled up to `width` with `fill` on the right: (B, width) int64."""
        place = self.starts[which, None] + np.arange(width)
        inside = np.arange(width) < self.lengths[which, None]
        return np.where(inside, self.tokens[np.minimum(place, len(self.tokens) - 1)], fill).astype(np.int64)


@dataclass(frozen=True)
class TokenizedPairs:
    """Pairs as tokens. train, val: (source, target). reason: why this tokenizer, a sentence.

    leaked: the share of the pairs held out whose source is among those of the training part. folder: where they lie.
    """

    train: tuple[TokenizedLines, TokenizedLines]
    val: tuple[TokenizedLines, TokenizedLines]
    tokenizer: Tokenizer
    reason: str
    leaked: float
    folder: Path

def tokenize_pairs(found: ParallelCorpus, tokenizer: str | Tokenizer = "auto", vocab_size: int | None = None,
            progress: Progress | None = None, cache: Path | None = None) -> TokenizedPairs:
    """The pairs as tokens: from the cache when they are there and whole, else made.

    Args:
        tokenizer: "auto" or "bpe" for one BPE of both languages, trained on the training part; or one from elsewhere.
        vocab_size: of a new one; None: by the length of the text.

    Raises:
        BardletError: too few pairs, a tokenizer without separator or padding, a cache that cannot be written.
    """
    spec = tokenizer.hash if isinstance(tokenizer, Tokenizer) else f"bpe {vocab_size} {found.lowercase}"
    key = hashlib.sha256(f"{found.hash} {found.val is None} {spec} {VERSION}".encode()).hexdigest()
    root = (cache or cache_folder()) / "tokens"
    folder = root / f"{found.name[:60]}-{key[:16]}"

    def build(whole: Path) -> None:
        _build(found, tokenizer, vocab_size, whole, progress)

    return shards.build_or_read(folder, build, _open)


def _build(found: ParallelCorpus, spec: str | Tokenizer, vocab_size: int | None, folder: Path,
           progress: Progress | None) -> None:
    """Writes tokenizer, four shards and prepared.json into an empty folder."""
    parts = {part: list(found.pairs(part)) for part in ("train", "val")}
    for part, pairs in parts.items():
        if not pairs:
            raise BardletError(f"{found.name}: its {'training' if part == 'train' else 'validation'} part has no pairs")
    if isinstance(spec, Tokenizer):
        tokenizer, reason = spec, f"{spec.kind}: the tokenizer that came with the model"
        if tokenizer.eos_id is None or tokenizer.pad_id is None:
            raise BardletError("the model's tokenizer has no token for the end of a line, or none for padding; "
                               "pairs need both, which every bpe of bardlet has")
    else:
        characters = sum(map(len, (line for pair in parts["train"] for line in pair)))
        # twice what one text would get: there are two languages, and shorter lines are worth the larger head (LOG.md)
        size = vocab_size or 2 * tokenization.suggest_vocab_size(characters, 0)
        if progress:
            progress("train bpe", 0, None)
        tokenizer = tokenization.train_bpe((line for pair in parts["train"] for line in pair), size, found.lowercase, True)
        reason = f"bpe: {tokenizer.vocab_size:,} tokens for both languages" + (", lower case" if found.lowercase else "")
    tokenizer.save(folder)
    for part, pairs in parts.items():
        for side, name in enumerate(SIDES):
            documents = ((f"{found.name}, {part}, {name}", pair[side]) for pair in pairs)
            shards.write_shard(folder / f"{part}.{name}.npy", documents, tokenizer, several=True)
    known = {source for source, _ in parts["train"]}
    leaked = sum(source in known for source, _ in parts["val"]) / len(parts["val"])
    facts = {"reason": reason, "leaked": round(leaked, 4)}
    (folder / "prepared.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    names = [f"{part}.{name}.npy" for part in parts for name in SIDES]
    manifest.write_manifest(folder, [*names, "prepared.json", "tokenizer.json", "tokenizer_config.json"])


def _open(folder: Path) -> TokenizedPairs:
    shards.check(folder)
    tokenizer = tokenization.load(folder)
    facts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))

    def lines(part: str, name: str) -> TokenizedLines:
        tokens = shards.open_shard(folder / f"{part}.{name}.npy")
        return TokenizedLines(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)

    train, val = (tuple(lines(part, name) for name in SIDES) for part in ("train", "val"))
    if any(len(source) != len(target) for source, target in (train, val)):
        raise BardletError(f"{folder}: source and target have different numbers of lines")
    return TokenizedPairs(train=train, val=val, tokenizer=tokenizer, folder=folder, **facts)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ batches


def bucket(length: np.ndarray) -> np.ndarray:
    """The width of the bucket for a pair of such a length: even up to 64, then in steps of a 32nd to a 16th. int64."""
    step = 2 ** np.maximum(1, np.ceil(np.log2(np.maximum(length, 1))).astype(np.int64) - 5)
    return -(-length // step) * step


class PairBatches:
    """Batches of pairs of similar lengths. An epoch has every pair once; how many batches it has is always the same.

    A pair is as wide as its longer side. Each bucket of widths is shuffled and cut into batches; what is left over goes
    on into the next wider bucket, so that one batch of an epoch at most is small. The batches come in random order.
    """

    def __init__(self, lines: tuple[TokenizedLines, TokenizedLines], format: PairFormat, batch_tokens: int, seed: int,
                 multiple: int = 1) -> None:
        """batch_tokens: rows times width of a batch, at most. Pairs that are wider than format.longest are left out.

        multiple: the rows of a batch are filled up to a multiple of it, with rows that have no targets.
        """
        self.lines, self.format, self.seed, self.multiple = lines, format, seed, multiple
        length = format.width(lines[0].lengths, lines[1].lengths)
        self.kept = np.flatnonzero(length <= format.longest)
        self.left_out = len(length) - len(self.kept)
        if not len(self.kept):
            raise BardletError(f"all {len(length):,} pairs are longer than --block-size {format.longest}: "
                               "take a larger one")
        self.width = np.minimum(bucket(length[self.kept]), format.longest)
        self.buckets = [(int(w), np.flatnonzero(self.width == w)) for w in np.unique(self.width)]
        self.rows = {w: max(1, batch_tokens // w) for w, _ in self.buckets}
        self._epochs: dict[int, list[np.ndarray]] = {}
        self.batches_per_epoch = len(self.epoch(0))

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of an epoch in their order: which pairs each has, (B,) int64."""
        if number not in self._epochs:
            random = np.random.default_rng([self.seed % 2**64, number])
            made: list[np.ndarray] = []
            left = np.zeros(0, np.int64)
            for width, members in self.buckets:
                pool, rows = np.concatenate((left, random.permutation(members))), self.rows[width]
                whole = len(pool) // rows * rows
                made += np.split(pool[:whole], whole // rows) if whole else []
                left = pool[whole:]
            if len(left):
                made.append(left)
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[number] = [self.kept[made[i]] for i in random.permutation(len(made))]
        return self._epochs[number]

    def batch(self, step: int) -> Batch:
        """The batch of a step from 0 on, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        return self.format.batch(self.lines, self.epoch(epoch)[within], self.multiple)

    def widest(self) -> Batch:
        """A batch as large as any could be: as many rows as the widest bucket has, a token in every place."""
        width = self.buckets[-1][0]
        rows = -(-self.rows[width] // self.multiple) * self.multiple
        ids, length = torch.zeros((rows, width), dtype=torch.int64), torch.full((rows,), width)
        own = {"prefix": torch.ones_like(length)} if self.format.joined else {"source": ids, "source_length": length}
        return {**own, "idx": ids, "target": ids}

    def describe_batch(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        epoch, within = divmod(step, self.batches_per_epoch)
        pairs = self.epoch(epoch)[within] + 1
        return (f"{windows.epoch_and_batch(step, self.batches_per_epoch)}, with the pairs "
                f"{', '.join(map(str, pairs[:5]))}{' ...' if len(pairs) > 5 else ''}")


@dataclass(frozen=True)
class PairFormat:
    """How pairs become the tensors of a batch.

    pad: the id that fills a row up; targets are IGNORE there. longest: no row is wider. joined: False, for an
    encoder-decoder, the source beside the target; True, for a decoder-only model, both in one row, a separator between.
    """

    pad: int
    longest: int
    joined: bool = False

    def width(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """How wide pairs are whose sides have such lengths."""
        return source + target - 1 if self.joined else np.maximum(source, target)

    def widths(self, lengths: np.ndarray) -> int:
        """The width of rows of which the longest is as long as the longest of `lengths`."""
        return min(self.longest, int(bucket(lengths.max()[None])[0]))

    def batch(self, lines: tuple[TokenizedLines, TokenizedLines], which: np.ndarray, multiple: int = 1) -> Batch:
        """The pairs `which` (B,), all tensors int64.

        Side by side: `source` (B, S), `source_length` (B,), `idx` (B, T), the target one later after a token of
        padding, which is where a decoder begins, and `target` (B, T). Joined: `idx`, `target` (B, T), and `prefix`
        (B,), the length of the source with its separator.
        """
        rows = len(which)
        which = np.concatenate((which, np.repeat(which[:1], -rows % multiple)))
        source, target = lines
        length, ends = source.lengths[which], target.lengths[which]
        if self.joined:
            ends = self.width(length, ends)
            T = self.widths(ends)
            both = self._join(lines, which, T + 1)
            made = {"idx": both[:, :-1], "prefix": length}
            goal = np.where(np.arange(1, T + 1) < length[:, None], IGNORE, both[:, 1:])
        else:
            T = self.widths(ends)
            goal = target.rows(which, T, self.pad)
            made = {"source": source.rows(which, self.widths(length), self.pad), "source_length": length,
                    "idx": np.concatenate((np.full((len(which), 1), self.pad), goal[:, :-1]), axis=1)}
        goal = np.where(np.arange(T) < ends[:, None], goal, IGNORE)
        goal[rows:] = IGNORE
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in (*made.items(), ("target", goal))}

    def _join(self, lines: tuple[TokenizedLines, TokenizedLines], which: np.ndarray, width: int) -> np.ndarray:
        """Source and target, one behind the other: (B, width)."""
        source, target = (side.rows(which, width, self.pad) for side in lines)
        length = lines[0].lengths[which, None]
        place = np.arange(width) - length
        shifted = np.take_along_axis(target, np.clip(place, 0, width - 1), axis=1)
        return np.where(place < 0, source, shifted)


def validation_batches(lines: tuple[TokenizedLines, TokenizedLines], format: PairFormat, batch_tokens: int) -> list[Batch]:
    """Every pair of the validation part that is not wider than format.longest, once, shortest first, in batches."""
    length = format.width(lines[0].lengths, lines[1].lengths)
    order = np.argsort(length, kind="stable")
    order = order[length[order] <= format.longest]
    made, start = [], 0
    while start < len(order):
        rows = max(1, batch_tokens // format.widths(length[order[start : start + 1]]))  # about: the last may be wider
        made.append(format.batch(lines, order[start : start + rows]))
        start += rows
    return made
