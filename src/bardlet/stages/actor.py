"""The actor of reinforcement learning: a policy samples completions, a scorer scores them, a reference anchors them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bardlet.config.finetuning import EXACT, RolloutConfig
from bardlet.data.prompts import Prompts
from bardlet.run.record import RolloutsRecord
from bardlet.runtime.distributed import Dist
from bardlet.stages import rewards
from bardlet.stages.rewards import Scorer
from bardlet.stages.rollout import Rollout, log_probability, sample_rollout
from bardlet.tokenizer import Tokenizer

MISSING_EOS_PENALTY = 1.0
"""Penalty for a completion without a stop token, in standard deviations of the reward; with a reward model only."""


@dataclass(frozen=True)
class Actor:
    """A policy with its reference and scorer: samples completions, scores them and measures their KL."""

    policy: Any
    reference: Any
    reward: Scorer
    tokenizer: Tokenizer
    config: RolloutConfig
    dist: Dist
    record: RolloutsRecord

    def sample(self, prompts: Prompts, indices: np.ndarray, number: int, temperature: float, dist: Dist) -> Rollout:
        """Sample completions of prompts by index, a pure function of (seed, number); each rank samples its share."""
        seeds = [_seed(self.config.seed, number, i) for i in range(len(indices))]
        return sample_rollout(self.policy, self.tokenizer, prompts, indices.tolist(), seeds, self.config, dist,
                                      temperature)

    def score(self, rollout: Rollout) -> np.ndarray:
        """Return the scorer's raw rewards: (A,) float32."""
        return self.reward(rollout.questions, rollout.completions)

    def normalize_rewards(self, rollout: Rollout, reward_A: np.ndarray) -> np.ndarray:
        """Return the rewards to train on, (A,) float32: standardized with the reference's mean and deviation.

        A reward model's reward also gets MISSING_EOS_PENALTY where a completion did not end. `exact` stays 0 and 1.
        """
        if self.config.reward == EXACT:
            return reward_A
        normalized_A = (reward_A - self.record.reward_mean) / self.record.reward_deviation
        if isinstance(self.reward, rewards.RewardModelScorer):
            unended_A = np.array([not completion.ended for completion in rollout.completions])
            normalized_A = normalized_A - MISSING_EOS_PENALTY * unended_A
        return normalized_A.astype(np.float32)

    def log_probability(self, model: Any, rollout: Rollout) -> torch.Tensor:
        """Return log p of the completion tokens under the policy or the reference: (A, T) float32."""
        return log_probability(model, rollout, self.config, self.dist)

    def kl(self, rollout: Rollout) -> float:
        """Estimate KL(policy || reference) from the policy's completions, in nats per completion."""
        return self.kl_of_each(rollout).mean().item()

    def kl_of_each(self, rollout: Rollout) -> torch.Tensor:
        """Return log p of each completion under the policy, less that under the reference: (A,) float32."""
        policy_AT, reference_AT = (self.log_probability(model, rollout) for model in (self.policy, self.reference))
        return (policy_AT - reference_AT).sum(1)

    def evaluate_policy(self, prompts: Prompts, temperature: float | None = None) -> tuple[Rollout, np.ndarray]:
        """Return (a completion of each prompt, their rewards (A,)), always with the same random numbers.

        temperature: None: greedy with --reward exact, else --temperature. Runs on this rank alone: others may have
        exited.
        """
        if temperature is None:
            temperature = 0.0 if self.config.reward == EXACT else self.config.temperature
        rollout = self.sample(prompts, np.arange(len(prompts)), -1, temperature, Dist(0, 1, self.dist.device))
        return rollout, self.score(rollout)


def _seed(seed: int, number: int, row: int) -> int:
    """Return the seed of a completion, independent of all others."""
    state = np.random.SeedSequence([seed, number + 1, row]).generate_state(1, np.uint64)
    return int(state[0] >> 1)
