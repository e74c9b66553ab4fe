"""Group relative policy optimization: compare several completions of the same prompt with each other.

Shao et al. (2024), *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models*. There is no
value model: the baseline of a completion is the mean reward of its group.
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
        """Return the policy itself: there is no critic."""
        return policy

    def completions_per_prompt(self) -> int:
        """Return the group size."""
        return self.config.group

    def compute_advantages(self, model: Any, batch: Batch, reward_A: torch.Tensor,
                           beta: float) -> dict[str, torch.Tensor]:
        """Return `advantage` (A, 1): the rewards normalized in each group (see `RL.compute_advantages`)."""
        return {"advantage": losses.group_advantages(reward_A.view(-1, self.config.group)).view(-1, 1)}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the loss summed over completion tokens. No `old`: the policy has not changed since the rollout."""
        mask_AT, config = batch["target"] != losses.IGNORE, self.config
        logp_AT = logprobs.log_probability(model, batch["idx"], batch["target"], config.temperature)
        old_AT = batch.get("old", logp_AT.detach())
        # at beta 0 the KL term would be 0 times a value that may be infinite
        reference_AT = batch["reference"] if config.beta else logp_AT
        return losses.grpo_loss(logp_AT, old_AT, reference_AT, batch["advantage"][:, 0], mask_AT, config.clip,
                                config.beta)
