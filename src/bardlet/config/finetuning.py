"""Settings of the fine-tuning stages: sft, reward, dpo, ppo and grpo. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from bardlet.config.model import ModelConfig
from bardlet.config.paths import given_reward
from bardlet.config.settings import AUTO, Auto, Rows, Settings
from bardlet.errors import BardletError

EXACT = "exact"
"""The --reward that compares a completion with the reference answer in the data."""


@dataclass(frozen=True)
class FineTuneConfig(Rows, Settings):
    """Settings of a stage that fine-tunes a model, whose shape it keeps."""

    summary: ClassVar[str]
    """Summary of the command, in a few words."""
    about: ClassVar[str]
    """Description of the command, in a sentence or two."""
    example: ClassVar[str]
    """Example of a command line."""

    text: tuple[str, ...] = ()
    """The model (a run folder or a Hugging Face folder), then data files: .jsonl or .json, also .gz and .xz."""
    lora: int | None = None
    """Train LoRA factors of this rank. The result has them merged into the weights (default: train all weights)."""
    max_bad: float = 0.05
    """Share of the records that may be unusable. They are left out and counted; with more, the run does not start."""
    batch_size: int = 32
    """Rows per micro-batch. Over all processes."""
    keep: Literal["best", "last", "average"] = "last"
    """Weights to save as the result. last: the final step; average: the mean over the last fifth of the steps;
    best: the lowest held-out loss. The held-out figures are then optimistic, since these data chose the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "batch_size")
        self.require(lambda x: 0 <= x <= 1, "from 0 to 1", "max_bad")

    def as_model(self, shape: ModelConfig) -> Self:
        """Return the settings with the context window of the base model, or a shorter one."""
        return replace(self, block_size=min(shape.block_size, self.block_size or shape.block_size))


@dataclass(frozen=True)
class SFTConfig(FineTuneConfig):
    """Settings of supervised fine-tuning on conversations."""

    stage = command = "sft"
    summary = "fine-tune a model on conversations (SFT)"
    about = ("Fine-tune a model with a bpe tokenizer on conversations: JSON records with `messages` (role, content), "
             "or with `instruction`, optional `input`, and `output`. The loss is taken on the assistant's tokens only.")
    example = "bardlet sft runs/base chats.jsonl"

    pack: bool = True
    """Pack several conversations per row. Attention is block-diagonal; --no-pack pads one conversation per row."""
    steps: int | None = None
    """Number of optimizer steps (default: three epochs)."""
    minutes: float | None = None
    """Time budget for the whole run (default: three epochs)."""
    eval_tokens: int = 131_072
    """Validation tokens per evaluation. Evenly spread; 0: all."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 5e-3
    """Peak learning rate of Muon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 0, "0 or more, and finite", "eval_tokens")

    @property
    def rows_vary(self) -> bool:
        """True if the width of the rows varies between steps."""
        return not self.pack


@dataclass(frozen=True)
class PreferenceConfig(FineTuneConfig):
    """Settings of stages that train on preference pairs."""

    steps: int | None = None
    """Number of optimizer steps (default: one epoch)."""
    minutes: float | None = None
    """Time budget for the whole run (default: one epoch)."""
    batch_size: int = 16
    """Pairs per micro-batch. Over all processes."""
    eval_tokens: int = 131_072
    """Validation tokens per evaluation. Evenly spread; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 0, "0 or more, and finite", "eval_tokens")

    @property
    def rows_vary(self) -> bool:
        """True if the width of the rows varies between steps."""
        return True

    @property
    def tokens_per_step(self) -> int:
        """Maximum number of tokens of the global batch: two completions per prompt."""
        return 2 * super().tokens_per_step


@dataclass(frozen=True)
class RewardConfig(PreferenceConfig):
    """Settings of reward modeling on preference pairs."""

    stage = command = "reward"
    summary = "train a reward model on preference pairs"
    about = ("Train a reward model on preference pairs: JSON records with `prompt`, `chosen` and `rejected`. The "
             "result scores completions for `bardlet ppo` and `bardlet grpo`.")
    example = "bardlet reward runs/chats-sft preferences.jsonl"

    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-3
    """Peak learning rate of Muon."""


@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Settings of direct preference optimization."""

    stage = command = "dpo"
    summary = "align a model with preference pairs (DPO)"
    about = ("Direct preference optimization on preference pairs: JSON records with `prompt`, `chosen` and `rejected`. "
             "The model at the start is the reference.")
    example = "bardlet dpo runs/chats-sft preferences.jsonl"

    beta: float = 0.1
    """KL coefficient against the reference model. Lower allows larger changes."""
    lr: float = 2e-5
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-4
    """Peak learning rate of Muon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x > 0, "more than 0", "beta")
        self.require(lambda x: x < 100, "at least 0 and below 100", "beta")


@dataclass(frozen=True)
class RolloutConfig(FineTuneConfig):
    """Settings of stages that sample completions and learn from their rewards."""

    reward: str | None = None
    """Reward: `exact`, a run of `bardlet reward`, or a command (required). `exact` gives 1 for a completion that ended
    and equals the answer in the data, else 0. A command reads one line of JSON per completion (messages; answer, the
    completion; ended; reference, the answer in the data or null) and prints one number per line."""
    rollout: int = 128
    """Completions sampled per rollout. Over all processes."""
    passes: int = 1
    """Optimization epochs per rollout."""
    answer_tokens: Auto[int] = AUTO
    """Maximum tokens of a completion (default: 64). At most half of the context window."""
    temperature: float = 1.0
    """Sampling temperature of completions."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    beta: float = 0.0
    """KL coefficient against the reference model. 0 disables it."""
    steps: int | None = None
    """Number of optimizer steps (default: 100 rollouts)."""
    minutes: float | None = None
    """Time budget for the whole run (default: 100 rollouts)."""
    batch_size: int = 32
    """Completions per micro-batch. Over all processes."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-3
    """Peak learning rate of Muon."""
    schedule: Literal["stable-decay", "cosine", "linear", "constant"] = "constant"
    """Learning-rate schedule after warmup. stable-decay: constant, then linear decay."""
    warmup_steps: int = 10
    """Warmup steps, at most a fifth of the run."""
    keep: Literal["best", "last", "average"] = "last"
    """Weights to save as the result. last: the final step; average: the mean over the last fifth of the steps;
    best: the highest held-out reward."""
    compile: Literal["auto", "on", "off"] = "off"
    """Use torch.compile for training. Sampling and evaluation are never compiled."""
    watch: bool = False
    """Print the answers to the same five held-out prompts before training and at each evaluation; append them to
    samples.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is not None:
            object.__setattr__(self, "reward", given_reward(self.reward))
        self.require(lambda x: x >= 1, "at least 1", "rollout", "passes", "answer_tokens")
        self.require(lambda x: x <= 2**20, f"at most {2**20}", "rollout", "passes", "answer_tokens")
        self.require(lambda x: 0 < x < float("inf"), "more than 0, and finite", "temperature", "clip")
        self.require(lambda x: 0 <= x < 100, "at least 0 and below 100", "beta")
        update = self.batch_size * self.grad_accum
        if self.rollout % update:
            size = f"--batch-size {self.batch_size}" + f" x --grad-accum {self.grad_accum}" * (self.grad_accum > 1)
            raise BardletError(f"--rollout {self.rollout} is not a multiple of an update of {update} completions "
                               f"({size}); use --rollout {-(-self.rollout // update) * update}")

    @property
    def rows_vary(self) -> bool:
        """True if the width of the rows varies between steps."""
        return True

    def as_model(self, shape: ModelConfig) -> Self:
        """Return `FineTuneConfig.as_model`; by default a completion takes at most half of the window."""
        config = super().as_model(shape)
        return config.resolved(answer_tokens=min(64, config.block_size // 2))


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """Settings of proximal policy optimization."""

    stage = command = "ppo"
    summary = "reinforcement learning with PPO, with a critic"
    about = ("Reinforcement learning with PPO: sample completions of the prompts in DATA, score them by --reward, "
             "update the policy and a critic.")
    example = "bardlet ppo runs/chats-sft chats.jsonl --reward runs/judge"

    passes: int = 4
    """Optimization epochs per rollout."""
    beta: float = 0.05
    """KL penalty per nat against the reference model. 0 disables it."""
    target_kl: float | None = None
    """Adapt beta towards this KL, in nats per completion (default: beta is fixed)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: 0 < x < float("inf"), "more than 0, and finite", "target_kl")
        if self.target_kl is not None and not self.beta:
            raise BardletError(f"--target-kl {self.target_kl:g} with --beta 0: a beta of 0 cannot adapt; "
                               "use a positive one, such as --beta 0.05")


@dataclass(frozen=True)
class GRPOConfig(RolloutConfig):
    """Settings of group relative policy optimization."""

    stage = command = "grpo"
    summary = "reinforcement learning with GRPO, without a critic"
    about = ("Reinforcement learning with GRPO: sample a group of completions for each prompt in DATA, score them by "
             "--reward, and learn from the differences within a group.")
    example = "bardlet grpo runs/chats-sft sums.jsonl --reward exact"

    group: int = 8
    """Completions per prompt, compared with each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 2, "at least 2: completions are compared with each other", "group")
        if self.rollout % self.group:
            raise BardletError(f"--rollout {self.rollout} is not a multiple of --group {self.group}; "
                               f"use --rollout {-(-self.rollout // self.group) * self.group}")


def is_command(reward: str | None) -> bool:
    """Return True if a --reward is a command. bardlet never runs a command that only a file names."""
    return reward is not None and reward != EXACT and not (reward and Path(reward).is_dir())
