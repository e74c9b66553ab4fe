"""The stages of training: `stage_of` names the one for given settings."""

from __future__ import annotations

from typing import Any

from bardlet.config.finetuning import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.settings import Settings
from bardlet.stages.base import Stage
from bardlet.stages.dpo import DPO
from bardlet.stages.grpo import GRPO
from bardlet.stages.ppo import PPO
from bardlet.stages.pretrain import Pretraining
from bardlet.stages.reward_model import RewardModeling
from bardlet.stages.sft import SFT
from bardlet.stages.translation import Translation

STAGES: dict[type[Settings], type[Stage[Any, Any, Any, Any]]] = {
    TrainConfig: Pretraining, TranslationConfig: Translation, SFTConfig: SFT, RewardConfig: RewardModeling,
    DPOConfig: DPO, PPOConfig: PPO, GRPOConfig: GRPO}


def stage_of(config: Settings) -> type[Stage[Any, Any, Any, Any]]:
    """The stage that these settings are for."""
    return next(STAGES[kind] for kind in type(config).__mro__ if kind in STAGES)
