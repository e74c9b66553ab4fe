"""Group relative policy optimization: several answers to each question, which are compared with each other.

Shao et al. (2024), *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models*. There is no
model of the values: what an answer is worth is told by the others of its group.
"""

from __future__ import annotations

from typing import Any

import torch

from bardlet.config.finetuning import GRPOConfig
from bardlet.data.batch import Batch
from bardlet.stages.rl import RL
from bardlet.training import logprobs, losses


class GRPO(RL[GRPOConfig]):
    """`bardlet grpo MODEL DATA --reward R`."""

    def build_policy(self, policy: Any) -> Any:
        """The policy alone."""
        return policy

    def answers_to_each(self) -> int:
        """A group of answers, which are compared with each other."""
        return self.config.group

    def compute_advantages(self, model: Any, batch: Batch, reward_A: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
        """`advantage` (A, 1): how much better an answer is than the others of its group (`RL.compute_advantages`)."""
        return {"advantage": losses.group_advantages(reward_A.view(-1, self.config.group)).view(-1, 1)}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of a batch, summed over the tokens of the answers; without `old` the policy has not moved since."""
        mask_AT, config = batch["target"] != losses.IGNORE, self.config
        logp_AT = logprobs.log_probability(model, batch["idx"], batch["target"], config.temperature)
        old_AT = batch.get("old", logp_AT.detach())
        # at beta 0 the divergence would be 0 times a number that may be infinite
        reference_AT = batch["reference"] if config.beta else logp_AT
        return losses.grpo_loss(logp_AT, old_AT, reference_AT, batch["advantage"][:, 0], mask_AT, config.clip, config.beta)
