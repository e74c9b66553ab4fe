"""The losses of SFT, DPO, reward modeling and KTO against their formulas, written out in float64 row by row.

The formulas are those of the papers and of TRL's trainers; `tests/acceptance/test_trl.py` runs TRL itself. Three seeds
each, and a fault in each formula that the comparison has to detect.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bardlet.config.model import ModelConfig
from bardlet.models import build
from bardlet.ops.cross_entropy import IGNORE
from bardlet.training import logprobs, losses

CLOSE = 2e-6
"""Largest relative difference: bardlet computes the first three losses in float32, as TRL does."""


def model_and_rows(seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a model with random weights, token ids (4, 12), and targets (4, 11) of answers in the second half."""
    torch.manual_seed(seed)
    model = build(ModelConfig("gpt2", vocab_size=17, block_size=12, n_layer=1, n_head=2, n_kv_head=2, n_embd=16,
                              head_dim=8, n_inner=32)).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    idx = torch.randint(17, (4, 12))
    target = idx[:, 1:].clone()
    target[:, :5] = IGNORE  # the prompt
    target[1, 9:] = IGNORE  # padding
    return model, idx, target


def answer_log_probabilities(model: Any, idx: torch.Tensor, target: torch.Tensor) -> list[list[float]]:
    """Return log p of each token of each row's answer, in plain Python from the logits."""
    with torch.no_grad():
        logits = model(idx[:, :-1]).tolist()
    rows = []
    for row, ids in zip(logits, target.tolist(), strict=True):
        rows.append([scores[i] - math.log(sum(math.exp(x) for x in scores))
                     for scores, i in zip(row, ids, strict=True) if i != IGNORE])  # fmt: skip
    return rows


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sft_is_the_mean_cross_entropy_of_the_answers(seed: int) -> None:
    """Over all answer tokens of the batch, not over rows: Ouyang et al. (2022), section 3.5.

    https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py: labels of -100 outside of the completion.
    """
    model, idx, target = model_and_rows(seed)
    rows = answer_log_probabilities(model, idx, target)
    total, count = -math.fsum(math.fsum(row) for row in rows), sum(map(len, rows))
    batch = {"idx": idx[:, :-1], "target": target}
    assert losses.count_targets(batch) == count == 4 * 6 - 2
    assert losses.completion_loss(model, batch).item() / count == pytest.approx(total / count, rel=CLOSE)
    mean_of_rows = -math.fsum(math.fsum(row) / len(row) for row in rows) / 4
    assert mean_of_rows != pytest.approx(total / count, rel=1e-3)  # the usual mistake is visible here


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_equation_7_of_its_paper(seed: int, beta: float) -> None:
    """Rafailov et al. (2023), https://arxiv.org/abs/2305.18290; loss_type "sigmoid" in

    https://github.com/huggingface/trl/blob/main/trl/trainer/dpo_trainer.py
    """
    model, idx, target = model_and_rows(seed)  # rows 0 and 1 chosen, 2 and 3 rejected
    pairs = {"idx": torch.stack(idx[:, :-1].chunk(2), 1), "target": torch.stack(target.chunk(2), 1)}
    policy = [math.fsum(row) for row in answer_log_probabilities(model, idx, target)]
    reference_B2 = torch.tensor(policy).view(2, 2).T.float() + 5 * torch.randn(2, 2)
    policy_B2 = logprobs.pair_log_probability(model, pairs)
    expected, gradients = 0.0, []
    for pair in range(2):
        (chosen, rejected), (ref_chosen, ref_rejected) = (policy[pair], policy[2 + pair]), reference_B2[pair].tolist()
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        expected -= log_sigmoid(margin)
        gradients.append(-beta / (1 + math.exp(margin)))
    chosen_B, rejected_B = (x.detach().requires_grad_() for x in policy_B2.unbind(1))
    loss = losses.dpo_loss(chosen_B, rejected_B, *reference_B2.unbind(1), beta)
    loss.backward()
    # log-probabilities are sums of 6 float32 numbers of up to 10 nats
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert chosen_B.grad.tolist() == pytest.approx(gradients, rel=1e-5)
    assert rejected_B.grad.tolist() == pytest.approx([-g for g in gradients], rel=1e-5)
    without_reference = -sum(log_sigmoid(beta * (policy[i] - policy[2 + i])) for i in range(2))
    assert without_reference != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_loss_is_that_of_bradley_and_terry(seed: int) -> None:
    """Ouyang et al. (2022), equation 1, https://arxiv.org/abs/2203.02155; without margin and centering in

    https://github.com/huggingface/trl/blob/main/trl/trainer/reward_trainer.py
    """
    torch.manual_seed(seed)
    chosen_B, rejected_B = (3 * torch.randn(16)).requires_grad_(), 3 * torch.randn(16)
    differences = [a - b for a, b in zip(chosen_B.tolist(), rejected_B.tolist(), strict=True)]
    loss = losses.bradley_terry_loss(chosen_B, rejected_B)
    loss.backward()
    assert loss.item() == pytest.approx(-math.fsum(map(log_sigmoid, differences)), rel=CLOSE)
    assert chosen_B.grad.tolist() == pytest.approx([-1 / (1 + math.exp(d)) for d in differences], rel=1e-5)
    assert math.fsum(-log_sigmoid(-d) for d in differences) != pytest.approx(loss.item(), rel=1e-2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kl", [0.0, 2.5, -1.5])
def test_kto_is_equation_8_of_its_paper(seed: int, kl: float) -> None:
    """Ethayarajh et al. (2024), https://arxiv.org/abs/2402.01306; loss_type "kto", with the KL clamped at 0, in

    https://github.com/huggingface/trl/blob/main/trl/trainer/kto_trainer.py
    """
    torch.manual_seed(seed)
    ratio_B, liked_B = 4 * torch.randn(12, dtype=torch.float64), torch.arange(12) % 3 == 0
    beta, weight = 0.2, {True: 1.3, False: 0.7}
    expected, gradients = 0.0, []
    for ratio, liked in zip(ratio_B.tolist(), liked_B.tolist(), strict=True):
        sign = 1 if liked else -1
        value = 1 / (1 + math.exp(-sign * beta * (ratio - max(kl, 0.0))))
        expected += weight[liked] * (1 - value)
        gradients.append(-sign * weight[liked] * beta * value * (1 - value))
    ratio_B.requires_grad_()
    loss = losses.kto_loss(ratio_B, torch.tensor(kl, dtype=torch.float64), liked_B, beta, weight[True], weight[False])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert ratio_B.grad is not None and ratio_B.grad.tolist() == pytest.approx(gradients, rel=1e-12)
    swapped = losses.kto_loss(ratio_B.detach(), torch.tensor(kl), ~liked_B, beta, weight[True], weight[False])
    assert swapped.item() != pytest.approx(expected, rel=1e-3)
