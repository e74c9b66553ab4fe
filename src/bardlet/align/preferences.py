"""Preferences as tokens and as batches: two answers to the same question beside each other.

And what a reward model and direct preference optimization have in common: the loop over the pairs that are held out,
and what is said of them. B pairs of a batch, 2 answers of a pair, the chosen one first, T positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet import data, files, loss
from bardlet.align import chat
from bardlet.align.packing import PARTS, Chats
from bardlet.config import TrainConfig
from bardlet.corpus import cache_folder
from bardlet.data import Progress
from bardlet.dist import Dist, autocast
from bardlet.errors import BardletError
from bardlet.examples import Examples, Preference
from bardlet.loss import IGNORE, Batch
from bardlet.tokenizer import Tokenizer
from bardlet.train import Trainer

VERSION = 3
SIDES = ("chosen", "rejected")
AT_ONCE = 8
"""Pairs that go through a model at once where nothing is learned."""


@dataclass(frozen=True)
class Pairs:
    """Number i of both are the two answers to the same question, with the question in front."""

    chosen: Chats
    rejected: Chats

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sides(self) -> tuple[Chats, Chats]:
        """(chosen, rejected)"""
        return self.chosen, self.rejected

    def part(self, which: slice) -> Pairs:
        """The pairs of a slice without step."""
        return Pairs(self.chosen.part(which), self.rejected.part(which))

    def lengths(self) -> np.ndarray:
        """How many tokens the longer answer of each has, with its question: int64."""
        return np.maximum(*(side.ends - side.starts for side in self.sides))


@dataclass(frozen=True)
class PreparedPairs:
    """Preferences as tokens; no prompt is in both parts."""

    train: Pairs
    val: Pairs
    tokenizer: Tokenizer


def key(found: Examples, words: Tokenizer) -> str:
    """What the tokens of preferences depend on, as sha256 (hex)."""
    return hashlib.sha256(f"{found.hash} {words.hash} {chat.TEMPLATE} {VERSION}".encode()).hexdigest()


def prepare(found: Examples, words: Tokenizer, dist: Dist, progress: Progress | None = None) -> PreparedPairs:
    """The preferences as tokens, by a tokenizer; rank 0 makes them, the others read what it made."""
    folder = cache_folder() / "tokens" / f"{found.name[:60]}-pairs-{key(found, words)[:16]}"
    with dist.main_first():
        return data.cached(folder, lambda whole: _build(found, words, whole, progress), lambda made: _open(made, words))


def _build(found: Examples, words: Tokenizer, folder: Path, progress: Progress | None) -> None:
    """Writes the arrays of both parts and sides into an empty folder."""
    names: list[str] = []
    for part, preferences in zip(PARTS, found.preferences(), strict=True):
        if progress:
            progress(f"tokens, {part}", 0, len(preferences))
        for side in SIDES:
            names += encoded(words, preferences, side).save(folder, f"{part}.{side}")
    files.seal(folder, names)


def encoded(words: Tokenizer, preferences: Sequence[Preference], side: str) -> Chats:
    """The chosen or the rejected answers, each behind its question."""
    marks, rows = chat.marks_of(words), []
    for one in preferences:
        last = {"role": "assistant", "content": getattr(one, side)}
        ids, answer = chat.encode(words, [*one.prompt, last], marks=marks)
        begins = len(answer) - int(answer[::-1].argmin())  # answers before the last do not count
        rows.append((ids, np.arange(len(ids)) >= begins))
    return Chats.of(rows, words.dtype)


def _open(folder: Path, words: Tokenizer) -> PreparedPairs:
    data.check(folder)

    train, val = (Pairs(*(Chats.load(folder, f"{part}.{side}") for side in SIDES)) for part in PARTS)
    return PreparedPairs(train, val, words)


class PairBatches:
    """Batches of pairs in random order, by step. An epoch has each pair once whose answers both fit."""

    def __init__(self, pairs: Pairs, block_size: int, rows: int, seed: int, pad: int, multiple: int = 1) -> None:
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

    def place(self, step: int) -> str:
        """Where the batch of a step lies, in words."""
        return data.place_of_batch(step, self.batches_per_epoch)


def count(batch: Batch) -> int:
    """How many pairs of a batch have answers."""
    return int((batch["length"][:, 0] > 0).sum())


# ---------------------------------------------------------------- what the stages of preferences share


def parts(ready: PreparedPairs, config: TrainConfig) -> tuple[Pairs, Pairs]:
    """(training, held-out) pairs. The development split is the last tenth of the training part."""
    if config.val_part == "val":
        return ready.train, ready.val
    cut = int(0.9 * len(ready.train))
    return ready.train.part(slice(cut)), ready.train.part(slice(cut, None))


def record(found: Examples, words: Tokenizer, learned: Pairs, held: Pairs, config: TrainConfig) -> dict[str, Any]:
    """What run.toml says of the pairs."""
    return {"text": found.name, "text_hash": found.hash, "tokenizer": words.kind, "documents": len(learned),
            "tokens": int(sum(side.answer.sum() for side in learned.sides)), "minutes": config.minutes,
            "longer": round(longer(held, config), 4), "guessing": round(math.log(2), 4)}


def longer(held: Pairs, config: TrainConfig) -> float:
    """The share of the pairs that fit into the window in which the chosen answer has more tokens; equal counts half."""
    kept = PairBatches(held, config.block_size, AT_ONCE, 0, pad=0).kept
    chosen, rejected = (side.ends[kept] - side.starts[kept] for side in held.sides)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean()) if len(kept) else math.nan


def batches(learned: Pairs, held: Pairs, pad: int, config: TrainConfig, dist: Dist,
            record: dict[str, Any]) -> PairBatches:  # fmt: skip
    """The batches of the training pairs. BardletError where none fits into the window, or none of those held out."""
    made = PairBatches(learned, config.block_size, config.batch_size * config.grad_accum, config.seed, pad,
                       config.grad_accum * dist.world)
    for pairs, what in ((learned, "pair of answers"), (held, "held-out pair of answers")):
        if not (pairs.lengths() <= config.block_size).any():
            raise BardletError(f"{record['text']}: no {what} fits into the model's window of {config.block_size} "
                               "tokens, with its question; take a model with a longer one")
    record["batches"], record["left_out"] = made.batches_per_epoch, made.left_out
    return made


def looked_at(config: TrainConfig) -> int:
    """How many held-out pairs --eval-tokens are, at least one; 0: all."""
    return max(1, config.eval_tokens // (2 * config.block_size)) if config.eval_tokens else 0


@torch.no_grad()
def measured(measure: Callable[[Batch], torch.Tensor], pairs: Pairs, config: TrainConfig, dist: Dist,
             most: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """What `measure`, (B, 2) of a batch, says of both answers of the pairs that fit into the window.

    Args:
        most: of so many, evenly spread; 0: of all.

    Returns:
        (numbers of the pairs, (N,) int64; what was measured, (N, 2) float64 on the CPU)
    """
    rows = PairBatches(pairs, config.block_size, AT_ONCE, 0, pad=0)
    rows.kept = rows.kept[:: -(-len(rows.kept) // most) if most else 1]
    numbers, made = [np.zeros(0, np.int64)], [torch.zeros((0, 2), dtype=torch.float64)]  # none may fit
    for which in rows.all():
        numbers.append(which)
        batch = {name: dist.put(x) for name, x in rows.of(which).items()}
        with autocast(config.dtype, dist.device):
            made.append(measure(batch).double().cpu())
    return np.concatenate(numbers), torch.cat(made)


@dataclass(frozen=True)
class Figures:
    """Of pairs: the loss of Bradley and Terry, the share in which the chosen answer has the greater reward, and by how
    much it has on average."""

    loss: float
    accuracy: float
    margin: float


def figures(reward_N2: torch.Tensor) -> Figures:
    """The figures of the rewards of both answers, (N, 2); a tie counts half."""
    chosen, rejected = reward_N2.unbind(1)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    value = loss.bradley_terry(chosen, rejected).item() / len(chosen)
    return Figures(value, right.mean().item(), (chosen - rejected).mean().item())


def said(t: Trainer, held: int, more: str) -> tuple[list[str], float]:
    """What a plan says of the pairs, of which so many are held out, and how often the planned steps read them."""
    r = t.record
    lines = [f"preferences: {r['text']}, {r['documents']:,} to learn from, {held:,} held out",
             f"{more}; the longer answer is the chosen one in {r['longer']:.1%} of those held out"]
    if r["left_out"]:
        lines.append(f"left out, longer than the window of {t.config.block_size} tokens: {r['left_out']:,}")
    return lines, t.state.steps / r["batches"]


def results(facts: dict[str, Any]) -> list[str]:
    """What a finished run has come to, in lines."""
    beats = "better than" if facts["accuracy"] > facts["longer"] else "no better than"
    return [f"held-out pairs: the chosen answer has the greater reward in {facts['accuracy']:.1%} (by "
            f"{facts['margin']:.3f} on average), {beats} taking the longer answer, {facts['longer']:.1%}"]
