"""Shared by the stages that learn from preferences.

What a reward model and direct preference optimization have in common: the loop over the pairs that are held out,
and what is said of them. B pairs of a batch, 2 answers of a pair, the chosen one first, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bardlet.config.settings import TrainConfig
from bardlet.data.batch import Batch
from bardlet.data.preferences import AT_ONCE, PairBatches, Pairs, PreparedPairs
from bardlet.data.records import Examples
from bardlet.errors import BardletError
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Trainer


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
    value = losses.bradley_terry(chosen, rejected).item() / len(chosen)
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
