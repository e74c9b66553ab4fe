"""Proximal policy optimization: the answers' rewards, the way from the reference as a cost, and a model of the values.

Schulman et al. (2017), *Proximal Policy Optimization Algorithms*; for language models Ziegler et al. (2019),
*Fine-Tuning Language Models from Human Preferences*, and Ouyang et al. (2022), step 3.
"""

from __future__ import annotations

from typing import Any

import torch

from bardlet.config.settings import TrainConfig
from bardlet.data import batch as data_batch
from bardlet.evaluation.metrics import rows_at_once
from bardlet.inference.generate import evaluating
from bardlet.models import reward
from bardlet.runtime.compiler import eager
from bardlet.runtime.device import autocast
from bardlet.training import logprobs, losses

VALUE_WEIGHT = 0.1
"""Of the values' loss beside the policy's: their gradients share one clipping."""
SLOW, MOST = 0.2, 0.2
"""By how much beta follows --target-kl: a fifth of the relative error, of which a fifth counts at most. Ziegler et al.
(section 2.2) take a tenth, and have thousands of rollouts for it; here are some hundred. With a half it swings: the
policy comes after it."""


def actor(policy: Any) -> reward.ActorCritic:
    """What is trained: the policy, and a critic that begins as its body, expecting 0 everywhere."""
    critic = reward.on_top_of(policy)
    torch.nn.init.zeros_(critic.score.weight)
    return reward.ActorCritic(policy, critic)


def learnable(model: reward.ActorCritic, batch: data_batch.Batch, reward_A: torch.Tensor, beta: float,
              config: TrainConfig) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a batch of a rollout has besides its tokens and their probabilities: `advantage`, `value` and `return`,
    (A, T) each.

    reward_A: it comes with the last token of an answer. beta: what each nat between policy and reference costs.
    """
    mask_AT = batch["target"] != losses.IGNORE
    value_AT = values(model, batch["idx"], config) * mask_AT
    reward_AT = -beta * (batch["old"] - batch["reference"])
    last_A = mask_AT.shape[1] - 1 - mask_AT.flip(1).int().argmax(1)
    reward_AT[torch.arange(len(last_A)), last_A] += reward_A
    advantage_AT = losses.advantages(reward_AT, value_AT, mask_AT)
    return {"advantage": losses.whiten(advantage_AT, mask_AT), "value": value_AT, "return": value_AT + advantage_AT}


@torch.no_grad()
def values(model: reward.ActorCritic, idx_AT: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """What the critic expects before each next token: (A, T) float32 on the CPU."""
    device = model.critic.score.weight.device
    rows = rows_at_once(model.config, idx_AT.shape[1])
    with evaluating(model), eager(model), autocast(config.dtype, device):
        return torch.cat([model.critic.values(some.to(device)).cpu() for some in idx_AT.split(rows)])


def learn(model: Any, batch: data_batch.Batch, config: TrainConfig) -> torch.Tensor:
    """The losses of policy and values of a batch, summed over the tokens of the answers."""
    mask_AT = batch["target"] != losses.IGNORE

    def compute(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        target = batch["target"][rows, :width]
        logits_NV, value_N = model(batch["idx"][rows, :width], target != losses.IGNORE)
        return logprobs.chosen(logits_NV, target, config.temperature), logprobs.spread(value_N, target != losses.IGNORE)

    logp_AT, value_AT = logprobs.by_length(mask_AT, compute)
    policy = losses.clipped_policy(logp_AT, batch["old"], batch["advantage"], mask_AT, config.clip)
    return policy + VALUE_WEIGHT * losses.clipped_value(value_AT, batch["value"], batch["return"], mask_AT, config.clip)


def adapted(beta: float, kl: float, target: float | None) -> float:
    """beta after a rollout whose answers are so far from the reference, in nats of an answer."""
    if target is None:
        return beta
    return beta * (1 + SLOW * min(MOST, max(-MOST, kl / target - 1)))
