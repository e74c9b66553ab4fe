"""Losses against numbers worked by hand."""

from __future__ import annotations

import math

import torch
from torch import nn

from bardlet.loss import IGNORE, count_targets, next_token


class Fixed(nn.Module):
    """A model that answers with the same logits, whatever it is asked."""

    def __init__(self, logits_V: list[float]) -> None:
        super().__init__()
        self.logits_V = torch.tensor(logits_V)

    def forward(self, idx_BT: torch.Tensor) -> torch.Tensor:
        return self.logits_V.expand(*idx_BT.shape, -1)


def test_a_model_that_knows_nothing_pays_log_v() -> None:
    """Equal logits: log V nats for each target."""
    batch = {"idx": torch.zeros(2, 3, dtype=torch.long), "target": torch.ones(2, 3, dtype=torch.long)}
    torch.testing.assert_close(next_token(Fixed([0.0] * 5), batch), torch.tensor(6 * math.log(5)))


def test_the_sum_of_minus_log_p() -> None:
    """p = (1/2, 1/4, 1/4): targets 0, 1, 2 cost log 2, log 4 and log 4."""
    model = Fixed([math.log(2), 0.0, 0.0])
    batch = {"idx": torch.zeros(1, 3, dtype=torch.long), "target": torch.tensor([[0, 1, 2]])}
    torch.testing.assert_close(next_token(model, batch), torch.tensor(5 * math.log(2)))


def test_masked_targets_count_nothing() -> None:
    """IGNORE adds neither to the sum nor to the count."""
    model = Fixed([math.log(2), 0.0, 0.0])
    batch = {"idx": torch.zeros(1, 3, dtype=torch.long), "target": torch.tensor([[0, IGNORE, IGNORE]])}
    torch.testing.assert_close(next_token(model, batch), torch.tensor(math.log(2)))
    assert count_targets(batch) == 1
