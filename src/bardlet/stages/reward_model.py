"""A reward model as a stage: it learns from comparisons to say how good an answer is, with one number.

Ouyang et al. (2022), *Training language models to follow instructions with human feedback*, step 2: the body of a model
that answers, with a scalar head; of two answers to one question the one that people chose is to get more. The names are
those of `stages/pretrain.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet.config.settings import TrainConfig
from bardlet.data import preferences as data_preferences
from bardlet.data import records
from bardlet.data.preferences import Pairs, PreparedPairs
from bardlet.data.records import Examples
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.models import reward as heads
from bardlet.run import card, hf, plots
from bardlet.runtime.distributed import Dist
from bardlet.stages import base, preference
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, logprobs
from bardlet.training.state import Objective, Trainer

BINS = 10
"""Of the predicted probabilities, to compare with what came."""


def find(config: TrainConfig) -> Examples:
    """The preferences that the settings name."""
    return records.find(config)


def prepare(found: Examples, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: Progress | None = None) -> PreparedPairs:
    """The preferences as tokens by the tokenizer of the model."""
    if words is None:
        raise BardletError("preferences are learned by a model that answers already: name it with --init DIR")
    return data_preferences.prepare(found, words, dist, progress)


def reward_objective(ready: PreparedPairs, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Objective:
    """Batches of pairs, the loss of Bradley and Terry, and that of the held-out pairs as evaluation."""
    learned, held = preference.parts(ready, config)
    batches = preference.batches(learned, held, int(ready.tokenizer.pad_id or 0), config, dist, record)
    most = preference.looked_at(config)

    def evaluate(model: Any) -> float:
        found = preference.measured(partial(logprobs.pair_rewards, model), held, config, dist, most)[1]
        return preference.figures(found).loss

    return Objective(batches.batch, logprobs.preferred, data_preferences.count, evaluate, batches.place, batches.widest)


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, PreparedPairs]:
    """A model with a new head, preferences and optimizers: a run that has not begun. Arguments: `pretrain`'s."""
    model, words, config = base.begin(config, dist, out, given, in_file, run)
    found = find(config)
    ready = prepare(found, config, words, dist, progress)
    record = preference.record(found, words, *preference.parts(ready, config), config)
    run = base.folder(run, out, f"{found.name}-reward")
    t = assemble(run, heads.on_top_of(model), ready, config, dist, record)
    base.plan(t, 1)  # a second time would be learned by heart (Ouyang et al., appendix C.2)
    return t, ready


def assemble(run: Path, model: Any, ready: PreparedPairs, config: TrainConfig, dist: Dist, record: dict[str, Any],
             resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the preferences. Arguments: `pretrain`'s."""
    make = partial(reward_objective, ready, dist=dist, record=record)
    return base.trainer(run, model, make, config, dist, record, resumed)


def said(t: Trainer, ready: PreparedPairs) -> tuple[list[str], float]:
    """What a plan says of the preferences, in lines, and how often the planned steps read them."""
    return preference.said(t, len(preference.parts(ready, t.config)[1]), f"begins with: {t.config.init}")


def expect(t: Trainer, ready: PreparedPairs) -> None:
    """Nobody knows what loss to expect of a preference."""


@dataclass(frozen=True)
class Judged:
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


def judged(model: Any, held: Pairs, config: TrainConfig, dist: Dist) -> tuple[np.ndarray, torch.Tensor, Judged]:
    """(numbers, (N,); rewards of both answers, (N, 2); how good they are) of the held-out pairs that fit."""
    which, reward_N2 = preference.measured(partial(logprobs.pair_rewards, model), held, config, dist)
    chosen, rejected = (side.ends[which] - side.starts[which] for side in held.sides)
    return which, reward_N2, Judged((reward_N2[:, 0] - reward_N2[:, 1]).numpy(), chosen - rejected)


def results(facts: dict[str, Any]) -> list[str]:
    """What a finished run has come to, in lines."""
    where = [f"{facts[name]:.1%} where it is {what}" for name, what in
             (("accuracy_longer", "the longer one"), ("accuracy_shorter", "the shorter one")) if name in facts]
    return [*preference.results(facts), f"the chosen answer has the greater reward in {', in '.join(where)}; margin "
            f"and difference in length correlate by {facts['likes_length']:.2f}; calibration error "
            f"{facts['calibration_error']:.3f}"]


def conclude(t: Trainer, ready: PreparedPairs) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: curves, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, with the accuracy on held-out pairs; some answers and rewards.
    """
    held = preference.parts(ready, t.config)[1]
    plots.loss_curve(t.run, card.title(t.run, t.record), "loss (nats per pair)")
    model, words = hf.read_folder(t.run, scores=True)
    model.to(t.dist.device)
    which, reward_N2, found = judged(model, held, t.config, t.dist)
    whole = preference.figures(reward_N2)
    facts = {"accuracy": round(whole.accuracy, 4), "margin": round(whole.margin, 4),
             "accuracy_longer": found.accuracy_where(found.longer > 0),
             "accuracy_shorter": found.accuracy_where(found.longer < 0),
             "likes_length": round(found.likes_length(), 4), "calibration_error": round(found.calibration_error(), 4)}
    t.record.update({name: value for name, value in facts.items() if value is not None})
    plots.margins(t.run, card.title(t.run, t.record), found.margins, *found.calibration())
    sample = "\n\n".join(_shown(words, held, int(i), reward_2.tolist()) for i, reward_2 in
                         list(zip(which, reward_N2, strict=True))[:: max(1, len(which) // SHOWN)][:SHOWN])
    t.record["finished"] = True
    record = checkpointing.write_run(t)
    card.reward_card(t.run, t.config, record, sample)
    return record, sample


SHOWN, LONGEST_SHOWN = 3, 300
"""Pairs on the card of a finished run, and characters of an answer there."""


def _shown(words: Tokenizer, held: Pairs, number: int, rewards: list[float]) -> str:
    """A pair with its rewards, the question first."""
    lines: list[str] = []
    for side, reward in zip(held.sides, rewards, strict=True):
        here = slice(int(side.starts[number]), int(side.ends[number]))
        ids, answer = side.tokens[here], side.answer[here]
        if not lines:
            lines.append(words.decode(ids[: int(answer.argmax())].tolist()))
        text = words.decode(ids[answer].tolist(), skip_special=True)
        lines.append(f"  {reward:+.2f}  {text[:LONGEST_SHOWN]}{' ...' if len(text) > LONGEST_SHOWN else ''}")
    return "\n".join(lines)
