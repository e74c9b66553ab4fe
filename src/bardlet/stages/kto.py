"""Kahneman-Tversky optimization: learn from single completions that were liked or disliked.

Ethayarajh et al. (2024), *KTO: Model Alignment as Prospect Theoretic Optimization*. Like DPO it has a frozen reference.
As in DPO, a row of the data is a pair: here its completion, and that of another prompt. From the latter a batch
estimates the KL divergence between policy and reference.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch

from bardlet.config.finetuning import DPOConfig
from bardlet.config.kto import KTOConfig
from bardlet.data import forms, records
from bardlet.data import preferences as data_preferences
from bardlet.data.batch import Batch
from bardlet.data.forms import Fields, Preference, Unusable
from bardlet.data.records import Examples
from bardlet.errors import BardletError, printable
from bardlet.evaluation.metrics import auc
from bardlet.run.record import PreferencesRecord
from bardlet.stages import dpo, preference
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs, losses
from bardlet.training.state import Objective


class Feedback(Examples):
    """Completions with a label, True for liked.

    Each row is paired with the completion of a row with another prompt, half a split away, for the KL estimate.
    """

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the files, as feedback."""
        return hashlib.sha256(f"feedback 2 {Examples(self.name, self.files).hash}".encode()).hexdigest()

    @cached_property
    def parts(self) -> tuple[list[tuple[Preference, bool]], ...]:
        """(training, held-out) rows with their labels, split by prompt."""
        rows = sorted(self.read(feedback), key=lambda row: _digest(row[0].prompt))
        parts = self.by_prompt(rows, [row.prompt for row, _ in rows], "labeled completions")
        return tuple([(Preference(row.prompt, row.chosen, other.chosen), label) for (row, label), (other, _) in
                      zip(part, part[len(part) // 2 :] + part[: len(part) // 2], strict=True)] for part in parts)

    def number_records(self, examples: Sequence[Any]) -> list[int]:
        """Return numbers that hold out a tenth of the liked and of the disliked rows, at least one of each."""
        count, numbers = {label: itertools.count(9) for label in (False, True)}, [0] * len(examples)
        for i in sorted(range(len(examples)), key=lambda i: _digest(examples[i][0].prompt, examples[i][0].chosen)):
            numbers[i] = next(count[examples[i][1]])
        return numbers

    def preferences(self) -> tuple[list[Preference], list[Preference]]:
        """Return (training, held-out) rows: `chosen` is the completion, `rejected` that of another row."""
        return cast(Any, tuple([row for row, _ in part] for part in self.parts))


def _digest(prompt: Sequence[forms.Message], completion: str = "") -> bytes:
    """Return a sort key for a random order that does not depend on the file's."""
    return hashlib.sha256((records.as_text(prompt) + completion).encode()).digest()


def feedback(fields: Fields) -> tuple[Preference, bool]:
    """Return the prompt and the completion of a record, and its label (`label` or `kto_tag`). Raises Unusable."""
    name = fields.first(("label", "kto_tag"))
    label = fields.read(name) if name else None
    if label not in (True, False):  # also 1 and 0
        raise Unusable(f'its "label" is {printable(label)}; write true for a liked completion, else false')
    messages = forms.conversation(fields)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unusable("has no completion after a prompt; end it with an assistant message")
    return Preference(messages[:-1], messages[-1]["content"], ""), bool(label)


class KTO(dpo.DPO):
    """`bardlet kto MODEL DATA`. `accuracy` is P(a liked completion has a higher reward than a disliked one)."""

    template = "kto"
    material = "labeled completions"
    expected = "feedback: records with `prompt`, `completion` and `label`"
    examples_class = Feedback
    unit = "completions"
    loss_unit = "per completion"
    curve_label = "KTO loss (per completion)"
    better = "liked"

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels of the (training, held-out) rows, bool, split as `pairs`."""
        train, held_out = (np.array([label for _, label in part]) for part in cast(Feedback, self.source).parts)
        cut = len(self.pairs()[0])
        return train[:cut], held_out if self.config.val_part == "val" else train[cut:]

    def new_record(self, tokenizer: Tokenizer) -> PreferencesRecord:
        """Return the record of a new run. BardletError if a split has completions of one kind only."""
        record, config = super().new_record(tokenizer), cast(KTOConfig, self.config)
        for part, label_N, rows in zip(("training", "held-out"), self.labels(), self.pairs(), strict=True):
            fits = rows.lengths() <= config.block_size
            if len(set(label_N[fits])) < 2:
                raise BardletError(f"{self.source.name}: of the {part} completions that fit the context window of "
                                   f"{config.block_size} tokens, {label_N[fits].sum()} are liked and "
                                   f"{(~label_N[fits]).sum()} disliked; add records of the missing label")
        record.longer = round(auc((rows.chosen.ends - rows.chosen.starts)[fits], label_N[fits]), 4)
        weight_N = np.where(label_N[fits], config.desirable_weight, config.undesirable_weight)
        record.guessing = round(float(weight_N.mean()) / 2, 4)  # the loss while policy and reference agree
        return record

    def objective(self, config: DPOConfig) -> Objective:
        """Return batches of completions, the KTO loss, and the loss on the held-out completions as evaluation."""
        batches, weights = self.batches(config), cast(KTOConfig, config)
        loss_of = partial(losses.kto_loss, beta=config.beta, desirable_weight=weights.desirable_weight,
                          undesirable_weight=weights.undesirable_weight)
        label_N = torch.from_numpy(self.labels()[0]).to(self.dist.device)
        reference_N2 = torch.from_numpy(np.array(self.references()[0])).to(self.dist.device)

        def loss(model: Any, batch: Batch) -> torch.Tensor:
            real_B, number_B = batch["length"][:, 0] > 0, batch["number"]
            log_ratio_B2 = (logprobs.pair_log_probability(model, batch) - reference_N2[number_B])[real_B]
            mismatched_B = log_ratio_B2[:, 1].detach().double()
            total, count = self.dist.sum(torch.stack((mismatched_B.sum(), torch.ones_like(mismatched_B).sum())))
            return loss_of(log_ratio_B2[:, 0], (total / count).float(), label_N[number_B][real_B])

        def evaluate(model: Any) -> float:
            reward_N2, label_N = self.held_out_rewards(model, preference.evaluation_rows(config))
            ratio_N2 = reward_N2 / config.beta
            return loss_of(ratio_N2[:, 0], ratio_N2[:, 1].mean(), label_N).item() / len(label_N)

        return Objective(batches.batch, loss, data_preferences.count_pairs, evaluate, batches.describe_batch,
                         batches.widest, all_logits=True)

    def held_out_rewards(self, model: Any, max_rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return implicit rewards of held-out rows that fit, (N, 2) float64, and their labels, (N,) bool."""
        indices, reward_N2 = dpo.rewards(model, self.pairs()[1], self.references()[1], self.config, self.dist, max_rows)
        return reward_N2, torch.from_numpy(self.labels()[1][indices])

    def accuracy_and_margin(self, model: Any) -> tuple[float, float]:
        """Return (accuracy, margin): the AUC of the reward, and the mean reward of liked minus disliked completions."""
        reward_N, label_N = (x.numpy() for x in self.held_out_rewards(model))
        return auc(reward_N[:, 0], label_N), float(reward_N[label_N, 0].mean() - reward_N[~label_N, 0].mean())

    def longer_share(self) -> str:
        """Return in how many of the pairs of a liked and a disliked completion the liked one is longer, as text."""
        return self.share(self.record.longer)

    def share(self, share: float) -> str:
        """Return a share of the pairs of a liked and a disliked held-out completion as text."""
        label_N = self.labels()[1][self.pairs()[1].lengths() <= self.config.block_size]
        return f"{100 * share:.3g} % of the pairs of {label_N.sum()} liked and {(~label_N).sum()} disliked completions"

    def verdict(self) -> str:
        """Return nothing: these pairs share completions, so they have no simple standard error."""
        return ""
