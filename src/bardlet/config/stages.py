"""Settings class of each stage. Nothing here imports torch.

    train   a text                   TrainConfig        reward  preferences   RewardConfig
            pairs of sentences       TranslationConfig  ppo     rewards       PPOConfig
    sft     conversations            SFTConfig          grpo    rewards       GRPOConfig
    dpo     preferences              DPOConfig          kto     labels        KTOConfig
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bardlet.config.finetuning import DPOConfig, FineTuneConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from bardlet.config.kto import KTOConfig
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.settings import Settings

NAMED_PAIRS = ("multi30k",)
"""Named parallel corpora."""

STAGES: dict[type[Settings], str] = {
    TrainConfig: "pretrain:Pretraining", TranslationConfig: "translation:Translation", SFTConfig: "sft:SFT",
    RewardConfig: "reward_model:RewardModeling", DPOConfig: "dpo:DPO", KTOConfig: "kto:KTO",
    PPOConfig: "ppo:PPO", GRPOConfig: "grpo:GRPO"}
"""Every stage: its settings, and the class in stages/ that runs it. The commands and the Python API come from here."""

CONFIGS = tuple(STAGES)

FINE_TUNING = tuple(kind for kind in CONFIGS if issubclass(kind, FineTuneConfig))
"""The stages that train a model further, in the order of a ChatGPT."""


def config_class(values: Mapping[str, Any]) -> type[Settings]:
    """Return the settings class for these values: by `stage`, and for pretraining by whether they name pairs."""
    stage = values.get("stage", "pretrain")
    if stage == "pretrain":
        text = values.get("text")
        named = isinstance(text, list | tuple) and bool(text) and text[0] in NAMED_PAIRS
        pairs = named or any(values.get(name) is not None for name in ("pair", "source", "target"))
        return TranslationConfig if pairs else TrainConfig
    return {config.stage: config for config in CONFIGS}.get(stage, TrainConfig)


def classes_with(name: str) -> list[type[Settings]]:
    """Return the settings classes that have a setting of this name."""
    return [config for config in CONFIGS if name in {field.name for field in fields(config)}]
