"""Direct preference optimization: learn from preference pairs without a reward model.

Rafailov et al. (2023), *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*. The reference
is the model of --init; its log-probability of each completion is computed once and cached.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from bardlet.config.finetuning import DPOConfig
from bardlet.data import preferences as data_preferences
from bardlet.data import shard_file, shards
from bardlet.data.batch import Batch
from bardlet.data.named import cache_folder
from bardlet.data.packing import PARTS
from bardlet.data.preferences import PreferenceDataset, TokenizedPreferences
from bardlet.errors import BardletError
from bardlet.inference import answers
from bardlet.inference.generate import eval_mode
from bardlet.run import card, hf, hub, plots
from bardlet.run.record import PreferencesRecord
from bardlet.runtime import manifest
from bardlet.runtime.distributed import Dist
from bardlet.stages import preference
from bardlet.stages.finetuning import check_base
from bardlet.stages.preference import PreferenceStage
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs, losses
from bardlet.training.state import Objective, Trainer

SAMPLES = 3
"""Held-out prompts in the sample of a finished run."""


@dataclass(frozen=True)
class DPODataset:
    """Tokenized preferences and the reference's log-probabilities of their completions, (N, 2) float32 per split."""

    pairs: PreferenceDataset
    train_reference: np.ndarray
    val_reference: np.ndarray
    base_hash: str
    """sha256 (hex) of the reference's weights."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.pairs.tokenizer


class DPO(PreferenceStage[DPOConfig, DPODataset, PreferencesRecord]):
    """`bardlet dpo MODEL DATA`."""

    template = "preferences"
    record_class = PreferencesRecord
    init_label = "reference"
    curve_label: ClassVar[str] = "DPO loss (nats per pair)"
    """Label of the loss curve."""

    def tokenize(self, tokenizer: Tokenizer | None) -> DPODataset:
        """Return the tokenized preferences and the reference's log-probabilities; both are cached.

        Raises:
            BardletError: --init is not given, is missing, or has changed since the run started.
        """
        pairs, config = self.tokenize_source(tokenizer), self.config
        if config.init is None:
            raise BardletError("DPO starts from a chat model; name it with --init DIR")
        init = hub.folder(config.init)
        base_hash = hf.weights_hash(init)
        parts_of_key = (data_preferences.cache_key(self.source, pairs.tokenizer), base_hash, str(config.block_size),
                        config.dtype, self.dist.device.type)
        key = hashlib.sha256(" ".join(parts_of_key).encode()).hexdigest()
        folder = cache_folder() / "tokens" / f"{self.source.name[:60]}-reference-{key[:16]}"

        def build(folder: Path) -> None:
            model, _ = hf.read_folder(init)
            model.to(self.dist.device)
            for part in PARTS:
                if self.progress:
                    self.progress(f"scoring the {part} split with the reference", 0, None)
                np.save(folder / f"{part}.npy", reference(model, getattr(pairs, part), config, self.dist))
            manifest.write_manifest(folder, [f"{part}.npy" for part in PARTS])

        def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
            shards.check(folder)
            train, val = (shard_file.read_array(folder / f"{part}.npy") for part in PARTS)
            return train, val

        with self.dist.main_first():
            return DPODataset(pairs, *shards.build_or_read(folder, build, read), base_hash)

    def preferences(self) -> PreferenceDataset:
        """Return the tokenized preferences."""
        return self.data.pairs

    def references(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the reference's log-probabilities for the (training, held-out) pairs: (N, 2) float32 each."""
        train_pairs = len(self.pairs()[0])
        train, development = self.data.train_reference[:train_pairs], self.data.train_reference[train_pairs:]
        return train, self.data.val_reference if self.config.val_part == "val" else development

    def build_trainer(self, run: Path, model: Any, resumed: bool = False) -> Trainer:
        """Return a `Trainer` at step 0 (see `Stage.build_trainer`), after checking that the reference is unchanged."""
        check_base(self.config, self.record, self.data.base_hash)
        return super().build_trainer(run, model, resumed)

    def objective(self, config: DPOConfig) -> Objective:
        """Return batches of pairs, the DPO loss, and the loss on the held-out pairs as evaluation."""
        batches, validation = self.batches(config), self.pairs()[1]
        train_reference, val_reference = self.references()
        reference_N2 = torch.from_numpy(np.array(train_reference)).to(self.dist.device)
        max_pairs = preference.evaluation_rows(config)

        def loss(model: Any, batch: Batch) -> torch.Tensor:
            real_B = batch["length"][:, 0] > 0
            policy_B2, reference_B2 = logprobs.pair_log_probability(model, batch), reference_N2[batch["number"]]
            both = zip(policy_B2[real_B].unbind(1), reference_B2[real_B].unbind(1), strict=True)
            (chosen_B, reference_chosen_B), (rejected_B, reference_rejected_B) = both
            return losses.dpo_loss(chosen_B, rejected_B, reference_chosen_B, reference_rejected_B, config.beta)

        def evaluate(model: Any) -> float:
            _, reward_N2 = rewards(model, validation, val_reference, config, self.dist, max_pairs)
            return preference.pair_metrics(reward_N2).loss

        return Objective(batches.batch, loss, data_preferences.count_pairs, evaluate, batches.describe_batch,
                         batches.widest, all_logits=True)

    def accuracy_and_margin(self, model: Any) -> tuple[float, float]:
        """Return the accuracy and the mean margin of the implicit rewards on the held-out pairs."""
        _, reward_N2 = rewards(model, self.pairs()[1], self.references()[1], self.config, self.dist)
        metrics = preference.pair_metrics(reward_N2)
        return metrics.accuracy, metrics.margin

    def measure(self, trainer: Trainer) -> str:
        """Record the accuracy on held-out pairs, draw the curve and return some completions."""
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record), self.curve_label)
        model, tokenizer = hf.read_folder(trainer.run)
        model.to(trainer.dist.device)
        accuracy, margin = self.accuracy_and_margin(model)
        self.record.update(accuracy=round(accuracy, 4), margin=round(margin, 4))
        chosen = self.pairs()[1].chosen
        spread = [chosen.tokens[a:b][: int(chosen.answer[a:b].argmax())] for a, b in
                  list(zip(chosen.starts, chosen.ends, strict=True))[:: max(1, len(chosen) // SAMPLES)]]
        prompts = [ids for ids in spread if len(ids) < trainer.config.block_size // 2][:SAMPLES]
        completions = answers.generate_answers(model, tokenizer, prompts, **answers.SAMPLING)
        return "\n\n".join(f"{tokenizer.decode(ids.tolist())}\n  -> {text}" for ids, (text, _) in
                           zip(prompts, completions, strict=True))


def reference(model: Any, pairs: TokenizedPreferences, config: DPOConfig, dist: Dist) -> np.ndarray:
    """Return log p of both completions of each pair: (N, 2) float32, 0 where a pair does not fit into the window."""
    logp = np.zeros((len(pairs), 2), np.float32)
    with eval_mode(model):
        indices, logp_N2 = preference.measure_pairs(partial(logprobs.pair_log_probability, model), pairs, config, dist)
    logp[indices] = logp_N2.numpy()
    return logp


def rewards(model: Any, pairs: TokenizedPreferences, reference_N2: np.ndarray, config: DPOConfig, dist: Dist,
            max_pairs: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Return the implicit rewards beta log(policy / reference) of both completions, after the indices of their pairs.

    (N,) int64 and (N, 2) float64, for the N pairs that fit into the context window.

    Args:
        model: in eval mode. max_pairs: see `preference.measure_pairs`.
    """
    score = partial(logprobs.pair_log_probability, model)
    indices, policy_N2 = preference.measure_pairs(score, pairs, config, dist, max_pairs)
    return indices, config.beta * (policy_N2 - torch.from_numpy(reference_N2[indices]))
