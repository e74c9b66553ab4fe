"""Group relative policy optimization: several answers to each question, which are compared with each other.

Shao et al. (2024), *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models*. There is no
model of the values: what an answer is worth is told by the others of its group.
"""

from __future__ import annotations

from typing import Any

import torch

from bardlet.config.settings import TrainConfig
from bardlet.data import batch as data_batch
from bardlet.training import logprobs, losses


def actor(policy: Any) -> Any:
    """What is trained: the policy alone."""
    return policy


def learnable(model: Any, batch: data_batch.Batch, reward_A: torch.Tensor, beta: float,
              config: TrainConfig) -> dict[str, torch.Tensor]:  # fmt: skip
    """What a batch of a rollout has besides its tokens and their probabilities: `advantage` (A, 1).

    reward_A: the --group answers to one question stand behind each other.
    """
    return {"advantage": losses.group_advantages(reward_A.view(-1, config.group)).view(-1, 1)}


def learn(model: Any, batch: data_batch.Batch, config: TrainConfig) -> torch.Tensor:
    """The loss of a batch, summed over the tokens of the answers; without `old` the policy has not moved since."""
    mask_AT = batch["target"] != losses.IGNORE
    logp_AT = logprobs.log_probability(model, batch["idx"], batch["target"], config.temperature)
    old_AT = batch.get("old", logp_AT.detach())
    # at beta 0 the divergence would be 0 times a number that may be infinite
    reference_AT = batch["reference"] if config.beta else logp_AT
    return losses.grpo(logp_AT, old_AT, reference_AT, batch["advantage"][:, 0], mask_AT, config.clip, config.beta)
