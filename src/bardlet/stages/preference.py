"""Shared by the stages that learn from preferences.

What a reward model and direct preference optimization have in common: the pairs, the loop over those that are held
out, and what is said of them. B pairs of a batch, 2 answers of a pair, the chosen one first, T positions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

import numpy as np
import torch

from bardlet.config.finetuning import PreferenceConfig
from bardlet.data import preferences as data_preferences
from bardlet.data import records
from bardlet.data.batch import Batch
from bardlet.data.corpus import development_begins
from bardlet.data.preferences import AT_ONCE, PreferenceBatches, PreferenceDataset, TokenizedPreferences
from bardlet.data.records import Examples
from bardlet.errors import BardletError
from bardlet.run.record import PreferencesRecord
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.stages.base import Data, FineTuning
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Trainer

P = TypeVar("P", bound=PreferenceConfig)
R = TypeVar("R", bound=PreferencesRecord)


class PreferenceStage(FineTuning[P, Examples, Data, R]):
    """A stage that learns which of two answers is preferred. A second reading would be learned by heart."""

    material = "preferences"
    unit = "pairs"
    record_class: ClassVar[type[PreferencesRecord]]
    begins_with: str
    """What the model of --init is called in the plan."""

    def load_data(self) -> Examples:
        """Find the preferences that the settings name."""
        return records.find(self.config.text, "preferences, .jsonl or .json, with `prompt`, `chosen` and `rejected`")

    def tokenized(self, tokenizer: Tokenizer | None) -> PreferenceDataset:
        """Make tokens of the preferences by the tokenizer of the model; rank 0 writes them, the others read."""
        if tokenizer is None:
            raise BardletError("preferences are learned by a model that answers already: name it with --init DIR")
        return data_preferences.tokenize_preferences(self.source, tokenizer, self.dist, self.progress)

    def pairs(self) -> tuple[TokenizedPreferences, TokenizedPreferences]:
        """(training, held-out) pairs. The development split is the last tenth of the training part."""
        prepared = self.prepared()
        if self.config.val_part == "val":
            return prepared.train, prepared.val
        cut = development_begins(len(prepared.train))
        return prepared.train.part(slice(cut)), prepared.train.part(slice(cut, None))

    @abstractmethod
    def prepared(self) -> PreferenceDataset:
        """The preferences as tokens."""

    def new_record(self, tokenizer: Tokenizer) -> R:
        """What run.toml says of the pairs."""
        learned, held = self.pairs()
        return cast(R, self.record_class(
            text=self.source.name, text_hash=self.source.hash, tokenizer=tokenizer.kind, documents=len(learned),
            tokens=int(sum(side.answer.sum() for side in learned.sides)), minutes=self.config.minutes,
            longer=round(longer_wins(held, self.config), 4), guessing=round(math.log(2), 4)))

    def describe_loss(self) -> str:
        """The validation loss with its units."""
        return f"{self.record.val_loss:.4f} nats per pair"

    def batches(self, config: PreferenceConfig) -> PreferenceBatches:
        """Batches of the training pairs. BardletError where none fits into the window, or none of those held out."""
        learned, held = self.pairs()
        made = PreferenceBatches(learned, config.block_size, config.batch_size * config.grad_accum, config.seed,
                           int(self.data.tokenizer.pad_id or 0), config.grad_accum * self.dist.world)
        for pairs, what in ((learned, "pair of answers"), (held, "held-out pair of answers")):
            if not (pairs.lengths() <= config.block_size).any():
                raise BardletError(f"{self.record.text}: no {what} fits into the model's window of {config.block_size} "
                                   "tokens, with its question; take a model with a longer one")
        self.record.batches, self.record.left_out = made.batches_per_epoch, made.left_out
        return made

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """What a plan says of the pairs, and how often the planned steps read them."""
        r, held = self.record, len(self.pairs()[1])
        lines = [f"preferences: {r.text}, {r.documents:,} to learn from, {held:,} held out",
                 f"{self.begins_with}: {trainer.config.init}; the longer answer is the chosen one in {r.longer:.1%} of "
                 "those held out"]
        if r.left_out:
            lines.append(f"left out, longer than the window of {trainer.config.block_size} tokens: {r.left_out:,}")
        return lines, trainer.state.steps / r.batches

    def results(self) -> list[str]:
        """What a finished run has come to, in lines."""
        r = self.record
        beats = "better than" if r.accuracy > r.longer else "no better than"
        return [f"held-out pairs: the chosen answer has the greater reward in {r.accuracy:.1%} (by {r.margin:.3f} on "
                f"average), {beats} taking the longer answer, {r.longer:.1%}"]


def longer_wins(held: TokenizedPreferences, config: PreferenceConfig) -> float:
    """The share of the pairs that fit into the window in which the chosen answer has more tokens; equal counts half."""
    kept = PreferenceBatches(held, config.block_size, AT_ONCE, 0, pad=0).kept
    chosen, rejected = (side.ends[kept] - side.starts[kept] for side in held.sides)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean()) if len(kept) else math.nan


def evaluation_rows(config: PreferenceConfig) -> int:
    """How many held-out pairs --eval-tokens are, at least one; 0: all."""
    return max(1, config.eval_tokens // (2 * config.block_size)) if config.eval_tokens else 0


@torch.no_grad()
def measure_pairs(measure: Callable[[Batch], torch.Tensor], pairs: TokenizedPreferences, config: PreferenceConfig, dist: Dist,
             most: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """What `measure`, (B, 2) of a batch, says of both answers of the pairs that fit into the window.

    Args:
        most: of so many, evenly spread; 0: of all.

    Returns:
        (numbers of the pairs, (N,) int64; what was measured, (N, 2) float64 on the CPU)
    """
    rows = PreferenceBatches(pairs, config.block_size, AT_ONCE, 0, pad=0)
    rows.kept = rows.kept[:: -(-len(rows.kept) // most) if most else 1]
    numbers, made = [np.zeros(0, np.int64)], [torch.zeros((0, 2), dtype=torch.float64)]  # none may fit
    for which in rows.all():
        numbers.append(which)
        batch = {name: dist.to_device(x) for name, x in rows.of(which).items()}
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
    value = losses.bradley_terry_loss(chosen, rejected).item() / len(chosen)
    return Figures(value, right.mean().item(), (chosen - rejected).mean().item())
