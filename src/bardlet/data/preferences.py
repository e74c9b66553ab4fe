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
from bardlet.data.forms import Preference
from bardlet.data.named import cache_folder
from bardlet.data.packing import PARTS, TokenizedChats
from bardlet.data.records import Examples, Report
from bardlet.data.shards import Progress
from bardlet.ops.cross_entropy import IGNORE
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer

VERSION = 4

SIDES = ("chosen", "rejected")

EVAL_BATCH_SIZE = 8
"""Pairs per forward pass without gradients."""


@dataclass(frozen=True)
class TokenizedPreferences:
    """Preference pairs as tokens: conversation i of both is the same prompt with its chosen or rejected completion."""

    chosen: TokenizedChats
    rejected: TokenizedChats

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sides(self) -> tuple[TokenizedChats, TokenizedChats]:
        """(chosen, rejected)"""
        return self.chosen, self.rejected

    def part(self, span: slice) -> TokenizedPreferences:
        """Return the pairs of a slice without step."""
        return TokenizedPreferences(self.chosen.part(span), self.rejected.part(span))

    def lengths(self) -> np.ndarray:
        """Return the tokens of each pair's longer conversation: int64."""
        return np.maximum(*(side.ends - side.starts for side in self.sides))


@dataclass(frozen=True)
class PreferenceDataset:
    """Tokenized preferences; no prompt is in both splits."""

    train: TokenizedPreferences
    val: TokenizedPreferences
    tokenizer: Tokenizer


def cache_key(examples: Examples, tokenizer: Tokenizer) -> str:
    """Return the sha256 (hex) of everything that the tokens of preferences depend on."""
    return hashlib.sha256(f"{examples.hash} {tokenizer.hash} {tokenizer.chat_template} {VERSION}".encode()).hexdigest()


def tokenize_preferences(examples: Examples, tokenizer: Tokenizer, dist: Dist,
                         progress: Progress | None = None) -> PreferenceDataset:
    """Return the preferences as tokens; rank 0 builds them, the other ranks read its files."""
    folder = cache_folder() / "tokens" / f"{examples.name[:60]}-pairs-{cache_key(examples, tokenizer)[:16]}"
    with dist.main_first():
        return shards.build_or_read(folder, lambda target: _build(examples, tokenizer, target, progress),
                                    lambda built: _open(built, tokenizer, examples.max_bad))


def _build(examples: Examples, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Write the arrays of both splits and sides into an empty folder."""
    names: list[str] = []
    for part, preferences in zip(PARTS, examples.preferences(), strict=True):
        if progress:
            progress(f"tokenizing the {part} split", 0, len(preferences))
        for side in SIDES:
            names += encode_side(tokenizer, preferences, side).save(folder, f"{part}.{side}")
    manifest.write_manifest(folder, [*names, examples.report.save(folder)])


def encode_side(tokenizer: Tokenizer, preferences: Sequence[Preference], side: str) -> TokenizedChats:
    """Encode the chosen or the rejected completions, each after its prompt."""
    special, rows = chat_template.special_tokens(tokenizer), []
    for preference in preferences:
        last = {"role": "assistant", "content": getattr(preference, side)}
        ids, answer = chat_template.encode(tokenizer, [*preference.prompt, last], special=special)
        end = int(np.flatnonzero(answer)[-1]) + 1  # a template may write something after the answer
        start = end - int(answer[:end][::-1].argmin())  # earlier assistant messages are part of the prompt
        rows.append((ids[:end], np.arange(end) >= start))
    return TokenizedChats.of(rows, tokenizer.dtype)


def _open(folder: Path, tokenizer: Tokenizer, max_bad: float) -> PreferenceDataset:
    shards.check(folder)
    Report.load(folder).announce(max_bad)
    train, val = (TokenizedPreferences(*(TokenizedChats.load(folder, f"{part}.{side}") for side in SIDES))
                  for part in PARTS)
    return PreferenceDataset(train, val, tokenizer)


class PreferenceBatches:
    """Batches of pairs in random order, by step. An epoch has each pair that fits, once."""

    def __init__(self, pairs: TokenizedPreferences, block_size: int, rows: int, seed: int, pad: int,
                 multiple: int = 1) -> None:
        """rows: pairs per batch. multiple: pad the last batch of an epoch to a multiple, with pairs without targets."""
        self.pairs, self.block_size, self.rows = pairs, block_size, rows
        self.seed, self.pad, self.multiple = seed, pad, multiple
        self.kept = np.flatnonzero(pairs.lengths() <= block_size)
        self.left_out = len(pairs) - len(self.kept)
        self.batches_per_epoch = -(-len(self.kept) // rows)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, on the CPU; a pure function of (seed, step)."""
        epoch, within = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed % 2**64, epoch]).permutation(self.kept)
        return self.of(order[within * self.rows : (within + 1) * self.rows])

    def all(self) -> list[np.ndarray]:
        """Return the indices of each batch, with all pairs once and similar lengths together."""
        order = self.kept[np.argsort(self.pairs.lengths()[self.kept], kind="stable")]
        return [order[first : first + self.rows] for first in range(0, len(order), self.rows)]

    def of(self, indices: np.ndarray) -> Batch:
        """Return the pairs `indices` as a batch, all int64.

        `idx` (B, 2, T): the conversations, padded on the right. `target` (B, 2, T): the next token if it belongs to
        the completion, else IGNORE. `length` (B, 2): 0 for a pair without targets. `number` (B,): index of the pair.
        """
        B = len(indices) + -len(indices) % self.multiple
        T = min(self.block_size, -(-int(self.pairs.lengths()[indices].max()) // 16) * 16)
        idx, target = np.full((B, 2, T), self.pad, np.int64), np.full((B, 2, T), IGNORE, np.int64)
        length = np.zeros((B, 2), np.int64)
        for b, i in enumerate(indices):
            for s, side in enumerate(self.pairs.sides):
                span = slice(int(side.starts[i]), int(side.ends[i]))
                ids, answer = side.tokens[span].astype(np.int64), side.answer[span]
                length[b, s] = n = len(ids)
                idx[b, s, :n] = ids
                target[b, s, : n - 1] = np.where(answer[1:], ids[1:], IGNORE)
        number = np.concatenate((indices, np.repeat(indices[:1], B - len(indices)))).astype(np.int64)
        arrays = {"idx": idx, "target": target, "length": length, "number": number}
        return {name: torch.from_numpy(x) for name, x in arrays.items()}

    def widest(self) -> Batch:
        """Return a batch as large as any can be."""
        ids = torch.zeros((self.rows, 2, self.block_size), dtype=torch.int64)
        length = torch.full((self.rows, 2), self.block_size)
        return {"idx": ids, "target": ids, "length": length, "number": torch.zeros(self.rows, dtype=torch.int64)}

    def describe_batch(self, step: int) -> str:
        """Return the epoch and batch of a step, for messages."""
        return windows.epoch_and_batch(step, self.batches_per_epoch)


def count_pairs(batch: Batch) -> int:
    """Return the number of pairs of a batch, without padding."""
    return int((batch["length"][:, 0] > 0).sum())
