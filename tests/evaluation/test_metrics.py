"""The units of a loss, and its mean over unequal batches."""

from __future__ import annotations

import math

import pytest
import torch

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.evaluation import metrics
from bardlet.models.base import LectureModel
from bardlet.training.losses import IGNORE


class Uniform(LectureModel):
    """Predicts four tokens with equal probability."""

    def __init__(self) -> None:
        super().__init__(ModelConfig("bigram", vocab_size=4))

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*idx.shape, 4)


def test_units_worked_by_hand() -> None:
    """5 tokens for "aéb" in UTF-8 and a separator: 4 predictions of log 4 nats over 2 characters, 3 bytes."""
    result = metrics.score(math.log(4), tokens=5, characters=3, size=4, first="a")
    assert result.tokens == 4
    assert result.nats_per_char == pytest.approx(4 * math.log(4) / 2)
    assert result.bits_per_byte == pytest.approx(4 * 2 / 3)


def test_the_mean_is_over_targets_not_batches() -> None:
    """A batch of 8 targets and a batch of 2: ten terms, masked targets not counted."""
    long = {"idx": torch.zeros(2, 4, dtype=torch.long), "target": torch.zeros(2, 4, dtype=torch.long)}
    short = {"idx": torch.zeros(1, 3, dtype=torch.long), "target": torch.tensor([[0, 1, IGNORE]])}

    class Better(Uniform):
        def logits(self, idx: torch.Tensor) -> torch.Tensor:
            logits = super().logits(idx)
            if idx.shape[1] == 3:
                logits[..., 2:] = -math.inf  # log 2 instead of log 4
            return logits

    mean = metrics.mean_loss(Better(), [long, short], torch.device("cpu"))
    assert mean == pytest.approx((8 * math.log(4) + 2 * math.log(2)) / 10, rel=1e-6)


def test_a_large_vocabulary_is_evaluated_in_micro_batches() -> None:
    """The widest tensor stays under 128 MiB; micro-batches of two rows give the mean of the whole batch."""
    config = TrainConfig(model="gpt2", n_layer=1, n_head=2, n_embd=16, block_size=8).resolved()
    shape = config.model_config(50_000)
    assert metrics.rows_at_once(shape, 256) == 128 * 2**20 // (4 * 256 * 50_000) == 2
    assert metrics.rows_at_once(shape, 8) == 64 and metrics.rows_at_once(shape, 10**6) == 1

    torch.manual_seed(0)
    model = models.build(config.model_config(11)).eval()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = {"idx": torch.randint(11, (5, 8)), "target": torch.randint(11, (5, 8))}
    whole, split = (metrics.mean_loss(model, [batch], torch.device("cpu"), rows=rows) for rows in (64, 2))
    assert seen == [5, 2, 2, 1] and split == pytest.approx(whole, rel=1e-6)
