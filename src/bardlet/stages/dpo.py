"""Direct preference optimization: which of two answers people prefer, learned without a reward model.

Rafailov et al. (2023), *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*. The reference
is the model that the run begins with; its log p of every answer is computed once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet.config.finetuning import DPOConfig
from bardlet.data import preferences as data_preferences
from bardlet.data import shards
from bardlet.data.batch import Batch
from bardlet.data.corpus import cache_folder
from bardlet.data.packing import PARTS
from bardlet.data.preferences import PreferenceDataset, TokenizedPreferences
from bardlet.errors import BardletError
from bardlet.inference import answers
from bardlet.inference.generate import eval_mode
from bardlet.run import card, hf, plots
from bardlet.run.record import PreferencesRecord
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.stages import preference
from bardlet.stages.base import check_base
from bardlet.stages.preference import PreferenceStage
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs, losses
from bardlet.training.state import Objective, Trainer

SAMPLES = 3
"""Held-out questions that a finished run answers on its card."""


@dataclass(frozen=True)
class DPODataset:
    """Preferences as tokens, and log p of their answers by the reference: (N, 2) float32 of both parts."""

    pairs: PreferenceDataset
    train_reference: np.ndarray
    val_reference: np.ndarray
    base_hash: str
    """sha256 (hex) of the reference's weights."""

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the model."""
        return self.pairs.tokenizer


class DPO(PreferenceStage[DPOConfig, DPODataset, PreferencesRecord]):
    """`bardlet dpo MODEL DATA`."""

    template = "preferences"
    record_class = PreferencesRecord
    begins_with = "reference"

    def tokenize(self, tokenizer: Tokenizer | None) -> DPODataset:
        """The preferences as tokens, and the reference's log p of each answer; both are kept in the cache.

        Raises:
            BardletError: the model that the run began with is not there any more, or is another.
        """
        pairs, config = self.tokenized(tokenizer), self.config
        if config.init is None:
            raise BardletError("preferences are learned by a model that answers already: name it with --init DIR")
        init = Path(config.init)
        known = hf.weights_hash(init)
        parts_of_key = (data_preferences.cache_key(self.source, pairs.tokenizer), known, str(config.block_size), config.dtype,
                        self.dist.device.type)
        key = hashlib.sha256(" ".join(parts_of_key).encode()).hexdigest()
        folder = cache_folder() / "tokens" / f"{self.source.name[:60]}-reference-{key[:16]}"

        def build(whole: Path) -> None:
            model, _ = hf.read_folder(init)
            model.to(self.dist.device)
            for part in PARTS:
                if self.progress:
                    self.progress(f"reference, {part}", 0, None)
                np.save(whole / f"{part}.npy", reference(model, getattr(pairs, part), config, self.dist))
            manifest.write_manifest(whole, [f"{part}.npy" for part in PARTS])

        def read(made: Path) -> tuple[np.ndarray, np.ndarray]:
            shards.check(made)
            train, val = (shards.read_array(made / f"{part}.npy") for part in PARTS)
            return train, val

        with self.dist.main_first():
            return DPODataset(pairs, *shards.build_or_read(folder, build, read), known)

    def prepared(self) -> PreferenceDataset:
        """The preferences as tokens."""
        return self.data.pairs

    def references(self) -> tuple[np.ndarray, np.ndarray]:
        """log p by the reference of both answers of the (training, held-out) pairs: (N, 2) float32 each."""
        learned = len(self.pairs()[0])
        known, rest = self.data.train_reference[:learned], self.data.train_reference[learned:]
        return known, self.data.val_reference if self.config.val_part == "val" else rest

    def build_trainer(self, run: Path, model: Any, resumed: bool = False) -> Trainer:
        """A `Trainer` at step 0 (`Stage.build_trainer`), whose reference is on record."""
        check_base(self.config, self.record, self.data.base_hash)
        return super().build_trainer(run, model, resumed)

    def objective(self, config: DPOConfig) -> Objective:
        """Batches of pairs, DPO's loss, and that of the held-out pairs as evaluation."""
        batches, held, (known, held_known) = self.batches(config), self.pairs()[1], self.references()
        reference_N2 = torch.from_numpy(np.array(known)).to(self.dist.device)
        most = preference.evaluation_rows(config)

        def learn(model: Any, batch: Batch) -> torch.Tensor:
            real_B = batch["length"][:, 0] > 0
            policy_B2, reference_B2 = logprobs.pair_log_probability(model, batch), reference_N2[batch["number"]]
            both = zip(policy_B2[real_B].unbind(1), reference_B2[real_B].unbind(1), strict=True)
            (chosen_B, known_chosen_B), (rejected_B, known_rejected_B) = both
            return losses.dpo_loss(chosen_B, rejected_B, known_chosen_B, known_rejected_B, config.beta)

        def evaluate(model: Any) -> float:
            return preference.figures(rewards(model, held, held_known, config, self.dist, most)).loss

        return Objective(batches.batch, learn, data_preferences.count_tokens, evaluate, batches.describe_batch, batches.widest,
                         all_logits=True)

    def measure(self, trainer: Trainer) -> str:
        """Put the accuracy on held-out pairs on record and draw the curve; return some answers."""
        held, known = self.pairs()[1], self.references()[1]
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record), "DPO's loss (nats per pair)")
        model, tokenizer = hf.read_folder(trainer.run)
        model.to(trainer.dist.device)
        found = preference.figures(rewards(model, held, known, self.config, trainer.dist))
        self.record.update(accuracy=round(found.accuracy, 4), margin=round(found.margin, 4))
        first = [held.chosen.tokens[a:b][: int(held.chosen.answer[a:b].argmax())] for a, b in
                 list(zip(held.chosen.starts, held.chosen.ends, strict=True))[:: max(1, len(held) // SAMPLES)]]
        asked = [ids for ids in first if len(ids) < trainer.config.block_size // 2][:SAMPLES]
        made = answers.generate_answers(model, tokenizer, asked, **answers.SAMPLING)
        return "\n\n".join(f"{tokenizer.decode(ids.tolist())}\n  -> {answer}" for ids, (answer, _) in
                           zip(asked, made, strict=True))


def reference(model: Any, pairs: TokenizedPreferences, config: DPOConfig, dist: Dist) -> np.ndarray:
    """log p of both answers of each pair: (N, 2) float32; 0 for a pair that does not fit into the window."""
    made = np.zeros((len(pairs), 2), np.float32)
    with eval_mode(model):
        which, logp_N2 = preference.measure_pairs(partial(logprobs.pair_log_probability, model), pairs, config, dist)
    made[which] = logp_N2.numpy()
    return made


def rewards(model: Any, pairs: TokenizedPreferences, reference_N2: np.ndarray, config: DPOConfig, dist: Dist,
            most: int = 0) -> torch.Tensor:
    """beta log(policy / reference) of both answers of the pairs by a model in eval mode: (N, 2) float64."""
    which, policy_N2 = preference.measure_pairs(partial(logprobs.pair_log_probability, model), pairs, config, dist, most)
    return config.beta * (policy_N2 - torch.from_numpy(reference_N2[which]))
