"""Base class and evaluation of the stages that learn from preferences: reward models, DPO and KTO.

B pairs of a batch, 2 completions of a pair, the chosen one first, T positions.
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
from bardlet.data.corpus import dev_split_start
from bardlet.data.preferences import EVAL_BATCH_SIZE, PreferenceBatches, PreferenceDataset, TokenizedPreferences
from bardlet.data.records import Examples
from bardlet.errors import BardletError
from bardlet.evaluation import likelihood
from bardlet.run.record import PreferencesRecord
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.stages.base import Data
from bardlet.stages.finetuning import FineTuning
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Trainer

MANY_PAIRS = 1000
"""With at least this many pairs, an accuracy is shown as a percentage only, with one decimal."""

P = TypeVar("P", bound=PreferenceConfig)
R = TypeVar("R", bound=PreferencesRecord)


class PreferenceStage(FineTuning[P, Examples, Data, R]):
    """A stage that learns which of two completions is preferred, by default in one epoch: a second one memorizes."""

    material = "preferences"
    unit = "pairs"
    loss_unit: ClassVar[str] = "nats per pair"
    record_class: ClassVar[type[PreferencesRecord]]
    expected: ClassVar[str] = "preferences: records with `prompt`, `chosen` and `rejected`"
    """Expected contents of the files, for messages."""
    examples_class: ClassVar[type[Examples]] = Examples
    init_label: str
    """The label of --init in the plan summary."""
    better: ClassVar[str] = "chosen"
    """Name of the completion that should have the higher reward."""

    def load_data(self) -> Examples:
        """Find the preference files named in the settings."""
        return records.find(self.config.text, self.expected, self.config.max_bad, self.examples_class)

    def tokenize_source(self, tokenizer: Tokenizer | None) -> PreferenceDataset:
        """Tokenize the preferences with the model's tokenizer; rank 0 writes, the other ranks read."""
        if tokenizer is None:
            raise BardletError("preference training starts from a chat model; name it with --init DIR")
        return data_preferences.tokenize_preferences(self.source, tokenizer, self.dist, self.progress)

    def pairs(self) -> tuple[TokenizedPreferences, TokenizedPreferences]:
        """Return (training, held-out) pairs. The development split is the last tenth of the training split."""
        dataset = self.preferences()
        if self.config.val_part == "val":
            return dataset.train, dataset.val
        cut = dev_split_start(len(dataset.train))
        return dataset.train.part(slice(cut)), dataset.train.part(slice(cut, None))

    @abstractmethod
    def preferences(self) -> PreferenceDataset:
        """Return the tokenized preferences."""

    def new_record(self, tokenizer: Tokenizer) -> R:
        """Return the record of a new run, with its statistics of the pairs."""
        train = self.pairs()[0]
        return cast(R, self.record_class(
            text=self.source.name, text_hash=self.source.hash, tokenizer=tokenizer.kind, documents=len(train),
            tokens=int(sum(side.answer.sum() for side in train.sides)), minutes=self.config.minutes,
            longer=round(longer_wins(self.length_differences()), 4), guessing=round(math.log(2), 4)))

    def describe_loss(self) -> str:
        """Return the validation loss with its units."""
        return f"{self.record.val_loss:z.4f} {self.loss_unit}"

    def batches(self, config: PreferenceConfig) -> PreferenceBatches:
        """Return batches of the training pairs. Raise BardletError if no training or no held-out pair fits."""
        train, validation = self.pairs()
        batches = PreferenceBatches(train, config.block_size, config.batch_size * config.grad_accum, config.seed,
                                    int(self.data.tokenizer.pad_id or 0), config.grad_accum * self.dist.parts)
        for pairs, name in ((train, "pair"), (validation, "held-out pair")):
            if not (pairs.lengths() <= config.block_size).any():
                raise BardletError(f"{self.record.text}: no {name} fits into the model's context window of "
                                   f"{config.block_size} tokens; use a model with a longer one")
        self.record.batches, self.record.left_out = batches.batches_per_epoch, batches.left_out
        return batches

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """Return (plan summary lines, number of epochs)."""
        r, validation = self.record, self.pairs()[1]
        lines = [f"preferences: {r.text}, {r.documents:,} for training, {len(validation):,} held out",
                 f"{self.init_label}: {trainer.config.init}",
                 f"held out: {self.length_baseline()}"]
        if r.left_out:
            lines.append(f"left out, longer than the context window of {trainer.config.block_size} tokens: "
                         f"{r.left_out:,}")
        return lines, trainer.state.steps / r.batches

    def length_baseline(self) -> str:
        """Return how well the length alone tells the completions apart, as text."""
        share = self.longer_share()
        note = "; ± is one standard error" * ("±" in share)
        return f"the longer completion is the {self.better} one in {share}{note}"

    def longer_share(self) -> str:
        """Return in how many of the evaluated held-out pairs the chosen completion is the longer one, as text."""
        differences = self.length_differences()
        if len(differences) == 0:
            return self.share(self.record.longer)
        equal = int((differences == 0).sum())
        return self.share(float((differences > 0).mean())) + f", {equal:,} of equal length" * (equal > 0)

    def results(self) -> list[str]:
        """Return the result lines of a finished run."""
        r = self.record
        return [f"held-out pairs: the {self.better} completion has the higher reward in {self.share(r.accuracy)}, "
                f"by {r.margin:z.3f} on average",
                f"picking the longer completion is right in {self.longer_share()}{self.verdict()}",
                *self.selection_bias()]

    def verdict(self) -> str:
        """Return "; the model is better" (or worse) than the length, if they differ by over two standard errors."""
        r, pairs = self.record, len(self.length_differences())
        errors = [likelihood.standard_error(share, pairs) or 0.0 for share in (r.accuracy, r.longer)]
        if pairs < 2 or abs(r.accuracy - r.longer) <= 2 * math.hypot(*errors):
            return ""
        return f"; the model is {'better' if r.accuracy > r.longer else 'worse'}"

    def card_figures(self) -> dict[str, str]:
        """Return the unit of the data and the accuracies as text for the model card."""
        r = self.record
        return {"unit": self.unit, "accuracy_text": self.share(r.accuracy), "longer_text": self.longer_share()}

    def share(self, share: float) -> str:
        """Return a share of the evaluated held-out pairs as text."""
        return format_share(share, len(self.length_differences()))

    def length_differences(self) -> np.ndarray:
        """Return tokens of the chosen minus the rejected completion of each held-out pair that fits: (N,) int64."""
        pairs = self.pairs()[1]
        kept = PreferenceBatches(pairs, self.config.block_size, EVAL_BATCH_SIZE, 0, pad=0).kept
        chosen, rejected = (side.ends[kept] - side.starts[kept] for side in pairs.sides)
        return chosen - rejected


def format_share(share: float, pairs: int) -> str:
    """Format the share of `pairs` with its count and standard error, as in "3 of 5 pairs (60 % ± 24)".

    The standard error of none or all of the pairs would be 0, which is no measure of it, so it is left out.
    """
    digits = 1 if pairs >= MANY_PAIRS else 0
    error = likelihood.standard_error(share, pairs)
    percent = f"{100 * share:.{digits}f} %" + (f" ± {100 * error:.{digits}f}" if error else "")
    if pairs >= MANY_PAIRS:  # the share is rounded, so its count would be wrong
        return f"{percent} of {pairs:,} pairs"
    correct = round(2 * share * pairs) / 2 if pairs else 0  # a tie counts half
    return f"{correct:g} of {pairs} pairs ({percent})"


def longer_wins(differences: np.ndarray) -> float:
    """Return the share of length differences (N,) above 0; a tie counts half."""
    return float(((differences > 0) + 0.5 * (differences == 0)).mean()) if len(differences) else math.nan


def evaluation_rows(config: PreferenceConfig) -> int:
    """Return the number of held-out pairs that --eval-tokens allows, at least 1; 0: no limit."""
    return max(1, config.eval_tokens // (2 * config.block_size)) if config.eval_tokens else 0


@torch.no_grad()
def measure_pairs(score: Callable[[Batch], torch.Tensor], pairs: TokenizedPreferences, config: PreferenceConfig,
                  dist: Dist, max_pairs: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Apply `score`, which returns (B, 2) for a batch, to the pairs that fit into the context window.

    Args:
        max_pairs: score at most this many pairs, evenly spread; 0: all.

    Returns:
        (indices of the pairs, (N,) int64; their scores, (N, 2) float64 on the CPU)
    """
    batches = PreferenceBatches(pairs, config.block_size, EVAL_BATCH_SIZE, 0, pad=0)
    batches.kept = batches.kept[:: -(-len(batches.kept) // max_pairs) if max_pairs else 1]
    indices, scores = [np.zeros(0, np.int64)], [torch.zeros((0, 2), dtype=torch.float64)]  # maybe no pair fits
    for batch_indices in batches.all():
        indices.append(batch_indices)
        batch = {name: dist.to_device(x) for name, x in batches.of(batch_indices).items()}
        with autocast(config.dtype, dist.device):
            scores.append(score(batch).double().cpu())
    return np.concatenate(indices), torch.cat(scores)


@dataclass(frozen=True)
class PairMetrics:
    """Bradley-Terry loss, accuracy (the chosen completion has the higher reward) and mean margin over pairs."""

    loss: float
    accuracy: float
    margin: float


def pair_metrics(reward_N2: torch.Tensor) -> PairMetrics:
    """Return the metrics for the rewards of both completions, (N, 2); a tie counts half."""
    chosen, rejected = reward_N2.unbind(1)
    correct = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    loss = losses.bradley_terry_loss(chosen, rejected).item() / len(chosen)
    return PairMetrics(loss, correct.mean().item(), (chosen - rejected).mean().item())
