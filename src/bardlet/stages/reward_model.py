"""Reward modeling: learn from preference pairs to score a completion with a single number.

Ouyang et al. (2022), *Training language models to follow instructions with human feedback*, step 2: the body of a chat
model gets a scalar head, trained to score the chosen completion of each pair higher than the rejected one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bardlet.config.finetuning import RewardConfig
from bardlet.data import preferences as data_preferences
from bardlet.data.preferences import PreferenceDataset, TokenizedPreferences
from bardlet.models import reward as reward_heads
from bardlet.run import card, hf, plots
from bardlet.run.record import RewardRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages import preference
from bardlet.stages.preference import PreferenceStage
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

BINS = 10
"""Bins of predicted probability in the calibration curve."""

MOSTLY_LENGTH = 0.7
"""Correlation of margin and length difference whose size means that the model mostly measures length."""

SAMPLES, SAMPLE_CHARACTERS = 3, 300
"""Pairs in the sample of a finished run, and characters of each completion."""


class RewardModeling(PreferenceStage[RewardConfig, PreferenceDataset, RewardRecord]):
    """`bardlet reward MODEL DATA`."""

    template = "reward_model"
    record_class = RewardRecord
    use = ""
    init_label = "base"

    def tokenize(self, tokenizer: Tokenizer | None) -> PreferenceDataset:
        """Tokenize the preferences with the model's tokenizer."""
        return self.tokenize_source(tokenizer)

    def preferences(self) -> PreferenceDataset:
        """Return the tokenized preferences."""
        return self.data

    def new_model(self, model: Any) -> Any:
        """Return the body of the model with a new scalar head."""
        return reward_heads.with_scalar_head(model)

    def objective(self, config: RewardConfig) -> Objective:
        """Return batches of pairs, the Bradley-Terry loss, and the same loss on the held-out pairs as evaluation."""
        batches, validation, max_pairs = self.batches(config), self.pairs()[1], preference.evaluation_rows(config)

        def evaluate(model: Any) -> float:
            score = partial(logprobs.pair_rewards, model)
            reward_N2 = preference.measure_pairs(score, validation, config, self.dist, max_pairs)[1]
            return preference.pair_metrics(reward_N2).loss

        return Objective(batches.batch, logprobs.preference_loss, data_preferences.count_pairs, evaluate,
                         batches.describe_batch, batches.widest, all_logits=True)

    def results(self) -> list[str]:
        """Return the result lines of a finished run."""
        r, where = self.record, self.accuracy_by_length()
        return [*super().results(), *(f"accuracy where the chosen completion is {name}: {text}"
                                      for name, text in where.items()),
                f"correlation of margin and length difference {r.likes_length:z.2f} (0: length has no influence); "
                f"calibration error {r.calibration_error:.3f} (0 is perfect)"]

    def card_figures(self) -> dict[str, str]:
        """Return the accuracies as text for the model card."""
        where = self.accuracy_by_length()
        return super().card_figures() | {f"accuracy_{name}_text": text for name, text in where.items()}

    def accuracy_by_length(self) -> dict[str, str]:
        """Return accuracies as text, where the chosen completion is "longer" and "shorter", unless there are none."""
        r, differences = self.record, self.length_differences()
        parts = {"longer": (r.accuracy_longer, differences > 0), "shorter": (r.accuracy_shorter, differences < 0)}
        return {name: preference.format_share(share, int(mask.sum())) for name, (share, mask) in parts.items()
                if share is not None}

    def measure(self, trainer: Trainer) -> str:
        """Record the accuracy on held-out pairs, draw the curves and return some completions with their rewards."""
        validation = self.pairs()[1]
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record), "loss (nats per pair)")
        model, tokenizer = hf.read_folder(trainer.run, scores=True)
        model.to(trainer.dist.device)
        indices, reward_N2, evaluation = evaluate_rewards(model, validation, self.config, trainer.dist)
        metrics = preference.pair_metrics(reward_N2)
        self.record.update(
            accuracy=round(metrics.accuracy, 4), margin=round(metrics.margin, 4),
            accuracy_longer=evaluation.accuracy_where(evaluation.longer > 0),
            accuracy_shorter=evaluation.accuracy_where(evaluation.longer < 0),
            likes_length=round(evaluation.length_correlation(), 4),
            calibration_error=round(evaluation.calibration_error(), 4))
        if warning := length_warning(evaluation.length_correlation()):
            log.warning(warning)
        plots.margins(trainer.run, card.title(trainer.run, self.record), evaluation.margins,
                      *evaluation.calibration())
        return "\n\n".join(_format_pair(tokenizer, validation, int(i), reward_2.tolist()) for i, reward_2 in
                           list(zip(indices, reward_N2, strict=True))[:: max(1, len(indices) // SAMPLES)][:SAMPLES])


@dataclass(frozen=True)
class RewardEvaluation:
    """A reward model's margins on held-out pairs, for accuracy, calibration and length bias.

    margins: reward of the chosen minus the rejected completion, (N,) float64. longer: the same difference in tokens,
    (N,) int64.
    """

    margins: np.ndarray
    longer: np.ndarray

    def accuracy_where(self, mask: np.ndarray) -> float | None:
        """Return the share of the pairs in `mask` (N,) with a positive margin; a tie counts half. None: no pairs."""
        m = self.margins[mask]
        return round(float(((m > 0) + 0.5 * (m == 0)).mean()), 4) if len(m) else None

    def calibration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (mean confidence, accuracy, number of pairs) of each bin that is not empty: (K,) each.

        Confidence is the probability, 1/2 to 1, that the model gives to the completion it prefers: the logistic
        function of the margin's size.
        """
        confidence = 1 / (1 + np.exp(-np.abs(self.margins)))
        correct = (self.margins > 0) + 0.5 * (self.margins == 0)
        bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        means = (np.bincount(bins, values, BINS)[counts > 0] / counts[counts > 0] for values in (confidence, correct))
        return (*means, counts[counts > 0])  # type: ignore[return-value]

    def calibration_error(self) -> float:
        """Return the expected calibration error (Guo et al. 2017, equation 3)."""
        confidence, accuracy, counts = self.calibration()
        return float((np.abs(confidence - accuracy) * counts).sum() / counts.sum())

    def length_correlation(self) -> float:
        """Return the correlation, -1 to 1, of margin and length difference; 0 if either is constant."""
        if not self.longer.std() or not self.margins.std():
            return 0.0
        return float(np.corrcoef(self.margins, self.longer)[0, 1])


def length_warning(correlation: float) -> str:
    """Return a warning if the margin has a high `correlation` with the length difference, else an empty string."""
    if abs(correlation) <= MOSTLY_LENGTH:
        return ""
    liked, other = ("longer", "shorter") if correlation > 0 else ("shorter", "longer")
    return (f"the model mostly measures length: it gives {liked} completions a higher reward; add pairs whose chosen "
            f"completion is the {other} one")


def evaluate_rewards(model: Any, pairs: TokenizedPreferences, config: RewardConfig,
                     dist: Dist) -> tuple[np.ndarray, torch.Tensor, RewardEvaluation]:
    """Return (indices (N,), rewards of both completions (N, 2), evaluation) of the pairs that fit into the window."""
    indices, reward_N2 = preference.measure_pairs(partial(logprobs.pair_rewards, model), pairs, config, dist)
    chosen, rejected = (side.ends[indices] - side.starts[indices] for side in pairs.sides)
    return indices, reward_N2, RewardEvaluation((reward_N2[:, 0] - reward_N2[:, 1]).numpy(), chosen - rejected)


def _format_pair(tokenizer: Tokenizer, pairs: TokenizedPreferences, index: int, rewards: list[float]) -> str:
    """Return the prompt of a pair, then both completions with their rewards."""
    lines: list[str] = []
    for side, reward in zip(pairs.sides, rewards, strict=True):
        span = slice(int(side.starts[index]), int(side.ends[index]))
        ids, answer = side.tokens[span], side.answer[span]
        if not lines:
            lines.append(tokenizer.decode(ids[: int(answer.argmax())].tolist()))
        text = tokenizer.decode(ids[answer].tolist(), skip_special=True)
        ellipsis = " ..." if len(text) > SAMPLE_CHARACTERS else ""
        lines.append(f"  {reward:+z.2f}  {text[:SAMPLE_CHARACTERS]}{ellipsis}")
    return "\n".join(lines)
