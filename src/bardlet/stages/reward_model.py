"""Training a reward model: it learns from comparisons to say how good an answer is, with one number.

Ouyang et al. (2022), *Training language models to follow instructions with human feedback*, step 2: the body of a model
that answers, with a scalar head; of two answers to one question the one that people chose is to get more.
"""

from __future__ import annotations

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

BINS = 10
"""Of the predicted probabilities, to compare with what came."""

SHOWN, LONGEST_SHOWN = 3, 300
"""Pairs on the card of a finished run, and characters of an answer there."""


class RewardModeling(PreferenceStage[RewardConfig, PreferenceDataset, RewardRecord]):
    """`bardlet reward MODEL DATA`."""

    template = "reward_model"
    record_class = RewardRecord
    use = ""
    begins_with = "begins with"

    def tokenize(self, tokenizer: Tokenizer | None) -> PreferenceDataset:
        """Make tokens of the preferences by the tokenizer of the model."""
        return self.tokenized(tokenizer)

    def prepared(self) -> PreferenceDataset:
        """The preferences as tokens."""
        return self.data

    def new_model(self, model: Any) -> Any:
        """The body of the model with a new head of one number."""
        return reward_heads.with_scalar_head(model)

    def objective(self, config: RewardConfig) -> Objective:
        """Batches of pairs, the loss of Bradley and Terry, and that of the held-out pairs as evaluation."""
        batches, held, most = self.batches(config), self.pairs()[1], preference.evaluation_rows(config)

        def evaluate(model: Any) -> float:
            found = preference.measure_pairs(partial(logprobs.pair_rewards, model), held, config, self.dist, most)[1]
            return preference.figures(found).loss

        return Objective(batches.batch, logprobs.preference_loss, data_preferences.count_tokens, evaluate, batches.describe_batch,
                         batches.widest, all_logits=True)

    def results(self) -> list[str]:
        """What a finished run has come to, in lines."""
        r = self.record
        shares = (("accuracy_longer", "the longer one"), ("accuracy_shorter", "the shorter one"))
        where = [f"{getattr(r, name):.1%} where it is {what}" for name, what in shares if getattr(r, name) is not None]
        return [*super().results(), f"the chosen answer has the greater reward in {', '.join(where)}; margin and "
                f"difference in length correlate by {r.likes_length:.2f}; calibration error {r.calibration_error:.3f}"]

    def measure(self, trainer: Trainer) -> str:
        """Put the accuracy on held-out pairs on record and draw the curves; return some answers and rewards."""
        held = self.pairs()[1]
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record), "loss (nats per pair)")
        model, tokenizer = hf.read_folder(trainer.run, scores=True)
        model.to(trainer.dist.device)
        which, reward_N2, found = evaluate_rewards(model, held, self.config, trainer.dist)
        whole = preference.figures(reward_N2)
        self.record.update(
            accuracy=round(whole.accuracy, 4), margin=round(whole.margin, 4),
            accuracy_longer=found.accuracy_where(found.longer > 0),
            accuracy_shorter=found.accuracy_where(found.longer < 0),
            likes_length=round(found.likes_length(), 4), calibration_error=round(found.calibration_error(), 4))
        plots.margins(trainer.run, card.title(trainer.run, self.record), found.margins, *found.calibration())
        return "\n\n".join(_shown(tokenizer, held, int(i), reward_2.tolist()) for i, reward_2 in
                           list(zip(which, reward_N2, strict=True))[:: max(1, len(which) // SHOWN)][:SHOWN])


@dataclass(frozen=True)
class RewardEvaluation:
    """What a reward model says of the held-out pairs, and what it takes for good.

    margins: by how much more the chosen answer got, (N,) float64. longer: how many tokens longer it is, (N,) int64.
    """

    margins: np.ndarray
    longer: np.ndarray

    def accuracy_where(self, which: np.ndarray) -> float | None:
        """The share of these pairs (N,) bool in which the chosen answer got more, a tie half; None where there are
        none."""
        m = self.margins[which]
        return round(float(((m > 0) + 0.5 * (m == 0)).mean()), 4) if len(m) else None

    def calibration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(how sure it was, how often it was right, how many pairs) of each bin that has pairs: (K,) each.

        How sure: the probability, 1/2 to 1, that it gave to the answer that it took for the better one, which is a
        logistic function of the margin.
        """
        sure = 1 / (1 + np.exp(-np.abs(self.margins)))
        right = (self.margins > 0) + 0.5 * (self.margins == 0)
        place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
        number = np.bincount(place, minlength=BINS)
        means = (np.bincount(place, of, BINS)[number > 0] / number[number > 0] for of in (sure, right))
        return (*means, number[number > 0])  # type: ignore[return-value]

    def calibration_error(self) -> float:
        """Expected calibration error: how far the two are apart on average (Guo et al. 2017, equation 3)."""
        sure, right, number = self.calibration()
        return float((np.abs(sure - right) * number).sum() / number.sum())

    def likes_length(self) -> float:
        """The correlation, -1 to 1, between margin and difference in length; 0 where one of them is constant."""
        if not self.longer.std() or not self.margins.std():
            return 0.0
        return float(np.corrcoef(self.margins, self.longer)[0, 1])


def evaluate_rewards(model: Any, held: TokenizedPreferences, config: RewardConfig, dist: Dist) -> tuple[np.ndarray, torch.Tensor, RewardEvaluation]:
    """(numbers, (N,); rewards of both answers, (N, 2); how good they are) of the held-out pairs that fit."""
    which, reward_N2 = preference.measure_pairs(partial(logprobs.pair_rewards, model), held, config, dist)
    chosen, rejected = (side.ends[which] - side.starts[which] for side in held.sides)
    return which, reward_N2, RewardEvaluation((reward_N2[:, 0] - reward_N2[:, 1]).numpy(), chosen - rejected)


def _shown(tokenizer: Tokenizer, held: TokenizedPreferences, number: int, rewards: list[float]) -> str:
    """A pair with its rewards, the question first."""
    lines: list[str] = []
    for side, reward in zip(held.sides, rewards, strict=True):
        here = slice(int(side.starts[number]), int(side.ends[number]))
        ids, answer = side.tokens[here], side.answer[here]
        if not lines:
            lines.append(tokenizer.decode(ids[: int(answer.argmax())].tolist()))
        text = tokenizer.decode(ids[answer].tolist(), skip_special=True)
        lines.append(f"  {reward:+.2f}  {text[:LONGEST_SHOWN]}{' ...' if len(text) > LONGEST_SHOWN else ''}")
    return "\n".join(lines)
