"""Preference pairs as tokens: chosen and rejected completions of a prompt, built once and cached, and their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bardlet.data import chat_template, shards, windows
from bardlet.data.batch import Batch
from bardlet.data.corpus import cache_folder
from bardlet.data.packing import PARTS, TokenizedChats
from bardlet.data.records import Examples, Preference
from bardlet.data.shards import Progress
from bardlet.ops.cross_entropy import IGNORE
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer

VERSION = 3

SIDES = ("chosen", "rejected")

AT_ONCE = 8
"""Pairs that go through a model at once where nothing is learned."""


@dataclass(frozen=True)
class TokenizedPreferences:
    """Number i of both are the two answers to the same question, with the question in front."""

    chosen: TokenizedChats
    rejected: TokenizedChats

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sides(self) -> tuple[TokenizedChats, TokenizedChats]:
        """(chosen, rejected)"""
        return self.chosen, self.rejected

    def part(self, which: slice) -> TokenizedPreferences:
        """The pairs of a slice without step."""
        return TokenizedPreferences(self.chosen.part(which), self.rejected.part(which))

    def lengths(self) -> np.ndarray:
        """How many tokens the longer answer of each has, with its question: int64."""
        return np.maximum(*(side.ends - side.starts for side in self.sides))


@dataclass(frozen=True)
class PreferenceDataset:
    """Preferences as tokens; no prompt is in both parts."""

    train: TokenizedPreferences
    val: TokenizedPreferences
    tokenizer: Tokenizer


def cache_key(found: Examples, tokenizer: Tokenizer) -> str:
    """What the tokens of preferences depend on, as sha256 (hex)."""
    return hashlib.sha256(f"{found.hash} {tokenizer.hash} {chat_template.TEMPLATE} {VERSION}".encode()).hexdigest()


def tokenize_preferences(found: Examples, tokenizer: Tokenizer, dist: Dist, progress: Progress | None = None) -> PreferenceDataset:
    """The preferences as tokens, by a tokenizer; rank 0 makes them, the others read what it made."""
    folder = cache_folder() / "tokens" / f"{found.name[:60]}-pairs-{cache_key(found, tokenizer)[:16]}"
    with dist.main_first():
        return shards.build_or_read(folder, lambda whole: _build(found, tokenizer, whole, progress),
                             lambda made: _open(made, tokenizer))


def _build(found: Examples, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Writes the arrays of both parts and sides into an empty folder."""
    names: list[str] = []
    for part, preferences in zip(PARTS, found.preferences(), strict=True):
        if progress:
            progress(f"tokens, {part}", 0, len(preferences))
        for side in SIDES:
            names += encode_side(tokenizer, preferences, side).save(folder, f"{part}.{side}")
    manifest.write_manifest(folder, names)


def encode_side(tokenizer: Tokenizer, preferences: Sequence[Preference], side: str) -> TokenizedChats:
    """The chosen or the rejected answers, each behind its question."""
    marks, rows = chat_template.special_tokens(tokenizer), []
    for one in preferences:
        last = {"role": "assistant", "content": getattr(one, side)}
        ids, answer = chat_template.encode(tokenizer, [*one.prompt, last], marks=marks)
        begins = len(answer) - int(answer[::-1].argmin())  # answers before the last do not count
        rows.append((ids, np.arange(len(ids)) >= begins))
    return TokenizedChats.of(rows, tokenizer.dtype)


def _open(folder: Path, tokenizer: Tokenizer) -> PreferenceDataset:
    shards.check(folder)

    train, val = (TokenizedPreferences(*(TokenizedChats.load(folder, f"{part}.{side}") for side in SIDES)) for part in PARTS)
    return PreferenceDataset(train, val, tokenizer)


class PreferenceBatches:
    """Batches of pairs in random order, by step. An epoch has each pair once whose answers both fit."""

    def __init__(self, pairs: TokenizedPreferences, block_size: int, rows: int, seed: int, pad: int, multiple: int = 1) -> None:
        """rows: pairs of a batch. multiple: the last one of an epoch is filled up to it, with pairs without targets."""
        self.pairs, self.block_size, self.rows = pairs, block_size, rows
        self.seed, self.pad, self.multiple = seed, pad, multiple
        self.kept = np.flatnonzero(pairs.lengths() <= block_size)
        self.left_out = len(pairs) - len(self.kept)
        self.batches_per_epoch = -(-len(self.kept) // rows)

    def batch(self, step: int) -> Batch:
        """The batch of a step from 0 on, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed % 2**64, epoch]).permutation(self.kept)
        return self.of(order[within * self.rows : (within + 1) * self.rows])

    def all(self) -> list[np.ndarray]:
        """The pairs once, those of similar lengths together: the numbers of each batch."""
        order = self.kept[np.argsort(self.pairs.lengths()[self.kept], kind="stable")]
        return [order[first : first + self.rows] for first in range(0, len(order), self.rows)]

    def of(self, which: np.ndarray) -> Batch:
        """The pairs `which`: `idx` (B, 2, T) int64, the conversations as they are, filled up on the right; `target`
        (B, 2, T) int64, the token after each where it is one of the answer, else IGNORE; `length` (B, 2) and `number`
        (B,) int64. A pair without targets has the length 0."""
        B = len(which) + -len(which) % self.multiple
        T = min(self.block_size, -(-int(self.pairs.lengths()[which].max()) // 16) * 16)
        idx, target = np.full((B, 2, T), self.pad, np.int64), np.full((B, 2, T), IGNORE, np.int64)
        length = np.zeros((B, 2), np.int64)
        for b, i in enumerate(which):
            for s, side in enumerate(self.pairs.sides):
                here = slice(int(side.starts[i]), int(side.ends[i]))
                ids, answer = side.tokens[here].astype(np.int64), side.answer[here]
                length[b, s] = n = len(ids)
                idx[b, s, :n] = ids
                target[b, s, : n - 1] = np.where(answer[1:], ids[1:], IGNORE)
        number = np.concatenate((which, np.repeat(which[:1], B - len(which)))).astype(np.int64)
        made = {"idx": idx, "target": target, "length": length, "number": number}
        return {name: torch.from_numpy(x) for name, x in made.items()}

    def widest(self) -> Batch:
        """A batch as large as any could be."""
        ids = torch.zeros((self.rows, 2, self.block_size), dtype=torch.int64)
        length = torch.full((self.rows, 2), self.block_size)
        return {"idx": ids, "target": ids, "length": length, "number": torch.zeros(self.rows, dtype=torch.int64)}

    def describe_batch(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        return windows.epoch_and_batch(step, self.batches_per_epoch)


def count_tokens(batch: Batch) -> int:
    """How many pairs of a batch have answers."""
    return int((batch["length"][:, 0] > 0).sum())
