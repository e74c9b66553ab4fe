"""Which settings belong to which stage. Nothing here imports torch.

    train   a text                   TrainConfig        reward  preferences   RewardConfig
            pairs of sentences       TranslationConfig  ppo     rewards       PPOConfig
    sft     conversations            SFTConfig          grpo    rewards       GRPOConfig
    dpo     preferences              DPOConfig
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bardlet.config.finetuning import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.settings import Settings

NAMED_PAIRS = ("multi30k",)
"""Named corpora of sentence pairs."""

CONFIGS: tuple[type[Settings], ...] = (TrainConfig, TranslationConfig, SFTConfig, RewardConfig, DPOConfig, PPOConfig,
                                       GRPOConfig)


def config_class(values: Mapping[str, Any]) -> type[Settings]:
    """The class of these settings: by `stage`, and in pretraining by whether they name pairs."""
    stage = values.get("stage", "pretrain")
    if stage == "pretrain":
        text = values.get("text")
        named = isinstance(text, list | tuple) and bool(text) and text[0] in NAMED_PAIRS
        pairs = named or any(values.get(name) is not None for name in ("pair", "source", "target"))
        return TranslationConfig if pairs else TrainConfig
    return {config.stage: config for config in CONFIGS}.get(stage, TrainConfig)


def classes_with(name: str) -> list[type[Settings]]:
    """The classes of settings that have one of this name."""
    return [config for config in CONFIGS if name in {field.name for field in fields(config)}]
