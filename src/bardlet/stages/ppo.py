"""Proximal policy optimization: rewards with a KL penalty, and a critic that predicts the return.

Schulman et al. (2017), *Proximal Policy Optimization Algorithms*; for language models Ziegler et al. (2019),
*Fine-Tuning Language Models from Human Preferences*, and Ouyang et al. (2022), step 3.
"""

from __future__ import annotations

from typing import Any

import torch

from bardlet.config.finetuning import PPOConfig
from bardlet.data.batch import Batch
from bardlet.evaluation.metrics import rows_at_once
from bardlet.inference.generate import eval_mode
from bardlet.models.reward import ActorCritic, with_scalar_head
from bardlet.runtime.compiler import eager
from bardlet.runtime.device import autocast
from bardlet.stages.rl import RL
from bardlet.training import logprobs, losses

VALUE_WEIGHT = 0.1
"""Weight of the value loss relative to the policy loss; both share one gradient clipping."""
KL_GAIN, MAX_KL_ERROR = 0.2, 0.2
"""Step size and clip of the controller that adapts the KL coefficient to --target-kl. Ziegler et al. (section 2.2) use
a gain of 0.1 over thousands of rollouts; runs here have a few hundred. A gain of 0.5 oscillates, because the policy
lags behind."""


class PPO(RL[PPOConfig]):
    """`bardlet ppo MODEL DATA --reward R`."""

    def build_policy(self, policy: Any) -> ActorCritic:
        """Return the policy with a critic that starts as a copy of its body and predicts 0 everywhere."""
        critic = with_scalar_head(policy)
        torch.nn.init.zeros_(critic.score.weight)
        return ActorCritic(policy, critic)

    def compute_advantages(self, model: ActorCritic, batch: Batch, reward_A: torch.Tensor,
                           beta: float) -> dict[str, torch.Tensor]:
        """Return `advantage`, `value` and `return`, (A, T) each; the last token of a completion gets its reward.

        See `RL.compute_advantages`.
        """
        mask_AT = batch["target"] != losses.IGNORE
        value_AT = values(model, batch["idx"], self.config.dtype) * mask_AT
        reward_AT = -beta * (batch["old"] - batch["reference"])
        last_A = mask_AT.shape[1] - 1 - mask_AT.flip(1).int().argmax(1)
        reward_AT[torch.arange(len(last_A)), last_A] += reward_A
        advantage_AT = losses.advantages(reward_AT, value_AT, mask_AT)
        return {"advantage": losses.whiten(advantage_AT, mask_AT), "value": value_AT, "return": value_AT + advantage_AT}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return policy loss plus weighted value loss, summed over completion tokens."""
        mask_AT, config = batch["target"] != losses.IGNORE, self.config

        def compute(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
            target = batch["target"][rows, :width]
            loss_RT, value_RT = model(batch["idx"][rows, :width], target, temperature=config.temperature)
            return 0 - loss_RT, value_RT

        logp_AT, value_AT = logprobs.map_buckets(mask_AT, compute)
        policy = losses.clipped_policy_loss(logp_AT, batch["old"], batch["advantage"], mask_AT, config.clip)
        value = losses.clipped_value_loss(value_AT, batch["value"], batch["return"], mask_AT, config.clip)
        return policy + VALUE_WEIGHT * value

    def uses_reference(self) -> bool:
        """Return True: the KL penalty is part of the reward, whatever beta becomes."""
        return True

    def next_beta(self, beta: float, kl: float) -> float:
        """Return beta adapted to --target-kl (see `RL.next_beta`)."""
        return adapt_kl_coef(beta, kl, self.config.target_kl)


@torch.no_grad()
def values(model: ActorCritic, idx_AT: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the critic's value at each token: (A, T) float32 on the CPU."""
    device = model.critic.score.weight.device
    rows = rows_at_once(model.config, idx_AT.shape[1])
    with eval_mode(model), eager(model), autocast(dtype, device):
        return torch.cat([model.critic.values(chunk.to(device)).cpu() for chunk in idx_AT.split(rows)])


def adapt_kl_coef(beta: float, kl: float, target: float | None) -> float:
    """Return the KL coefficient after a rollout with a mean KL of `kl` nats per completion; no target: unchanged."""
    if target is None:
        return beta
    return beta * (1 + KL_GAIN * min(MAX_KL_ERROR, max(-MAX_KL_ERROR, kl / target - 1)))
