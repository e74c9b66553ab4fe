"""The settings of the stages that go on from a model: sft, reward, dpo, ppo, grpo. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from bardlet.config.model import ModelConfig
from bardlet.config.settings import AUTO, Auto, Rows, Settings
from bardlet.errors import BardletError

EXACT = "exact"
"""The --reward that compares an answer with the one in the data."""


@dataclass(frozen=True)
class FineTuneConfig(Rows, Settings):
    """A stage that goes on from a model which has learned already. Its shape is that of the model."""

    lora: int | None = None
    """LoRA of this rank, which leaves the matrices as they are and learns a small change of each; the result has both
    in one. None: all weights are learned."""
    batch_size: int = 32
    """Rows of a micro-batch, over all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "batch_size")

    def as_model(self, shape: ModelConfig) -> Self:
        """The settings with the context window of the weights that training starts from, or a shorter one."""
        return replace(self, block_size=min(shape.block_size, self.block_size or shape.block_size))


@dataclass(frozen=True)
class SFTConfig(FineTuneConfig):
    """Supervised fine-tuning on conversations."""

    stage = command = "sft"

    pack: bool = True
    """Several conversations in a row, none of which sees another; without it a row for each, filled up."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: three times all conversations)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: three times all conversations)."""
    eval_tokens: int = 131_072
    """Validation tokens of one evaluation, evenly spread; 0: all."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 5e-3
    """Peak learning rate of Muon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 0, "0 or more, and finite", "eval_tokens")

    @property
    def rows_vary(self) -> bool:
        """Whether the rows of one step are wider than those of another."""
        return not self.pack


@dataclass(frozen=True)
class PreferenceConfig(FineTuneConfig):
    """What learning from pairs of answers has in common."""

    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: all pairs once)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: all pairs once)."""
    batch_size: int = 16
    """Pairs of a micro-batch, over all processes."""
    eval_tokens: int = 131_072
    """Validation tokens of one evaluation, evenly spread; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 0, "0 or more, and finite", "eval_tokens")

    @property
    def rows_vary(self) -> bool:
        """Whether the rows of one step are wider than those of another."""
        return True

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch at most: two answers to each question."""
        return 2 * super().tokens_per_step


@dataclass(frozen=True)
class RewardConfig(PreferenceConfig):
    """Training a reward model on preferences."""

    stage = command = "reward"

    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-3
    """Peak learning rate of Muon."""


@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Direct preference optimization."""

    stage = command = "dpo"

    beta: float = 0.1
    """How much it costs to leave the model that it began with; lower goes further."""
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
    """What learning from answers of the model's own has in common."""

    reward: str | None = None
    """What an answer is worth (has to be said): `exact` (1 for an answer that ended and is the one in the data, else
    0), a run folder of `bardlet reward`, or a command that reads a line of JSON for each answer (messages; answer, what
    the model wrote; ended; reference, the answer in the data or null) and prints a number for each."""
    rollout: int = 128
    """Answers that the model writes before it learns from them, over all processes."""
    passes: int = 1
    """How often each answer is learned from."""
    answer_tokens: Auto[int] = AUTO
    """Tokens of the longest answer; none: 64, at most half of the window."""
    temperature: float = 1.0
    """Of the answers: below 1 more careful, above 1 wilder."""
    clip: float = 0.2
    """By how much a token's probability may change, as a share, before it is learned no more."""
    beta: float = 0.0
    """How much it costs to leave the model that it began with; 0: nothing."""
    steps: int | None = None
    """Optimizer steps; none: by --minutes (neither: 100 rollouts)."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: 100 rollouts)."""
    batch_size: int = 32
    """Answers of a micro-batch, over all processes."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-3
    """Peak learning rate of Muon."""
    schedule: Literal["stable-decay", "cosine", "linear", "constant"] = "constant"
    """What follows the warm-up: constant then a linear decay, a half cosine, a line, or nothing."""
    warmup_steps: int = 10
    """Steps from zero to the peak learning rate (at most a fifth of the run)."""
    keep: Literal["best", "last", "average"] = "last"
    """Weights of the result: of the last step, their mean over the last fifth of the steps, or those of the best
    held-out reward."""
    compile: Literal["auto", "on", "off"] = "off"
    """torch.compile the blocks for learning; what is written and read otherwise is not compiled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 1, "at least 1", "rollout", "passes", "answer_tokens")
        self.require(lambda x: 0 < x < float("inf"), "more than 0, and finite", "temperature", "clip")
        self.require(lambda x: 0 <= x < 100, "at least 0 and below 100", "beta")
        update = self.batch_size * self.grad_accum
        if self.rollout % update:
            raise BardletError(f"--rollout {self.rollout} cannot be cut into updates of {update} answers (--batch-size "
                               f"{self.batch_size}{f' x --grad-accum {self.grad_accum}' if self.grad_accum > 1 else ''}"
                               f"): take --rollout {-(-self.rollout // update) * update}")

    @property
    def rows_vary(self) -> bool:
        """Whether the rows of one step are wider than those of another."""
        return True

    def as_model(self, shape: ModelConfig) -> Self:
        """As `FineTuneConfig.as_model`; an answer that nobody bounded leaves half of the window to the question."""
        config = super().as_model(shape)
        return config.resolved(answer_tokens=min(64, config.block_size // 2))


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """Proximal policy optimization."""

    stage = command = "ppo"

    passes: int = 4
    """How often each answer is learned from."""
    beta: float = 0.05
    """What each nat costs by which it leaves the model that it began with; 0: nothing."""
    target_kl: float | None = None
    """Let beta follow, so that answers are so far (nats of an answer) from the model that it began with; none: beta
    stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: 0 < x < float("inf"), "more than 0, and finite", "target_kl")
        if self.target_kl is not None and not self.beta:
            raise BardletError(f"--target-kl {self.target_kl:g} with --beta 0: a beta of 0 cannot follow it; "
                               "give another, as 0.05")


@dataclass(frozen=True)
class GRPOConfig(RolloutConfig):
    """Group relative policy optimization."""

    stage = command = "grpo"

    group: int = 8
    """Answers to each question, which are compared with each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda x: x >= 2, "at least 2: answers are compared with each other", "group")
        if self.rollout % self.group:
            raise BardletError(f"--rollout {self.rollout} is no multiple of --group {self.group}: "
                               f"take --rollout {-(-self.rollout // self.group) * self.group}")


def is_command(reward: str | None) -> bool:
    """Whether a --reward names a program: nobody runs one that only a file asks for."""
    return reward is not None and reward != EXACT and not (reward and Path(reward).is_dir())
