"""The settings that all stages share: a frozen dataclass, checked as it is made. Nothing here imports torch.

`config/pretraining.py` and `config/finetuning.py` have a subclass for each stage, `config/model.py` the shape of a
model. A field's docstring is its help text on the command line. `run.toml` in a run folder holds the settings as
resolved, followed by a `[record]` of what happened; `bardlet train --config run.toml` repeats the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from bardlet.errors import BardletError

T = TypeVar("T")
AUTO: Any = None
"""The value of a setting that nobody chose."""

if TYPE_CHECKING:
    Auto = Annotated[T, "None until it is resolved"]
else:

    class Auto:
        """`Auto[int]`: None while the value is open, an int once `resolved`. A type checker sees what is resolved."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


@dataclass(frozen=True)
class Settings:
    """What every training run can be told. A stage adds its own."""

    stage: ClassVar[str]
    """What the stage is called in run.toml."""
    command: ClassVar[str]
    """What it is called on the command line."""
    default_minutes: ClassVar[float | None] = None
    """The time of a run that has neither --steps nor --minutes; None: its data say how many steps it has."""
    auto_defaults: ClassVar[dict[str, Any]] = {"dropout": 0.0, "weight_decay": 0.1}
    """What an `Auto` setting becomes when no plan chooses it."""
    short_rows: ClassVar[bool] = False
    """Whether the rows of a batch are sentences, whose attention is a small part of the work."""
    batch_setting: ClassVar[str] = "batch_size"
    """The setting that counts the rows, or the tokens, of a micro-batch."""

    text: tuple[str, ...] = ()
    """Files to learn from."""
    val_part: Literal["val", "dev"] = "val"
    """What is held out: the validation text, or the development split cut from the end of the training part."""

    init: str | None = None
    """Start from the weights and the tokenizer of this run or Hugging Face folder."""
    lora: int | None = None
    """With --init: LoRA of this rank, which leaves the matrices as they are and learns a small change of each; the
    result has both in one. None: all weights are learned."""
    block_size: Auto[int] = AUTO
    """Context window, in tokens; none: that of the model."""
    dropout: Auto[float] = AUTO
    """Probability of dropping an activation in training; none: 0."""

    steps: int | None = None
    """Optimizer steps; none: by --minutes."""
    minutes: float | None = None
    """Time for the whole run; none: by --steps (neither: 5 minutes)."""
    grad_accum: int = 1
    """Micro-batches of a step."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 2e-2
    """Peak learning rate of Muon."""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    schedule: Literal["stable-decay", "cosine", "linear", "constant"] = "stable-decay"
    """What follows the warm-up: constant then a linear decay, a half cosine, a line, or nothing."""
    warmup_steps: int = 50
    """Steps from zero to the peak learning rate (at most a fifth of the run)."""
    decay_share: float = 0.8
    """Share of the steps that the decay of stable-decay takes."""
    weight_decay: Auto[float] = AUTO
    """Decoupled weight decay of matrices and embeddings (not of norms and biases); none: 0.1, or by the plan."""
    beta1: float = 0.9
    """AdamW's average of gradients."""
    beta2: float = 0.99
    """AdamW's average of squared gradients."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    keep: Literal["best", "last", "average"] = "best"
    """Weights of the result: of the last step, their mean over the last fifth of the steps, or the best of these and of
    all evaluated steps by the validation loss."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not a number: stop, or skip the step (ten in a row stop)."""
    eval_every: int | None = None
    """Steps between evaluations; none: about 20 in a run, or fewer than would take longer than training; 0: only at the
    end."""
    save_every: int | None = None
    """Steps between checkpoints; none: about 10 in a run; 0: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are removed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    seed: int = 1337
    """Seed of the weights, the batches and the dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes an NVIDIA GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; auto: bf16 where the processor has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the blocks; auto: where a compiler is found and the run is long enough to gain."""
    threads: int | None = None
    """CPU threads; none: all cores."""
    deterministic: bool = False
    """Deterministic algorithms on a GPU too (a CPU always has them)."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: str | None = None
    """Log to this Weights & Biases project."""

    replans: tuple[tuple[int, int], ...] = ()
    """(step, steps planned from there on): what a clock decided in the run that wrote this file."""

    def __post_init__(self) -> None:
        self.require(lambda x: x >= 1, "at least 1", "block_size", "grad_accum", "keep_checkpoints", "log_every",
                     "lora")
        self.require(lambda x: 0 < x < math.inf, "more than 0, and finite", "steps", "minutes", "threads")
        self.require(lambda x: 0 <= x < math.inf, "0 or more, and finite", "eval_every", "save_every", "warmup_steps",
                     "weight_decay", "grad_clip", "seed")
        # beyond these the libraries below fail in ways that nobody can read
        for name, most in (("seed", 2**63 - 1), ("threads", 1024), ("block_size", 2**24)):
            self.require(lambda x, most=most: x <= most, f"at most {most}", name)
        self.require(lambda x: 0 < x < 100, "more than 0 (and a plausible rate)", "lr", "muon_lr")
        self.require(lambda x: 0 <= x < 1, "at least 0 and below 1", "dropout", "beta1", "beta2")
        self.require(lambda x: 0 <= x <= 1, "from 0 to 1", "min_lr_ratio", "decay_share")
        if self.steps is not None and self.minutes is not None and not self.replans:
            raise BardletError("--steps and --minutes are both given: keep the one that should decide")

    def require(self, holds: Any, what: str, *names: str) -> None:
        """Raise BardletError for the first of these settings that has a value for which `holds` is false."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise BardletError(f"{flag(name)} {value}: it must be {what}")

    def resolved(self, *names: str, **chosen: Any) -> Self:
        """The settings with a value for each `Auto` that is open: by `chosen`, else by `plain`; what is set stays.

        names: resolve these alone.
        """
        values = {**self.auto_defaults, **chosen}
        return replace(self, **{name: value for name, value in values.items()
                                if getattr(self, name) is None and (not names or name in names)})

    @property
    def set_by_user(self) -> set[str]:
        """The names of the settings that differ from their defaults, before they are resolved."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}

    @property
    def rows_vary(self) -> bool:
        """Whether the rows of one step are wider than those of another."""
        return False

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, at most."""
        raise NotImplementedError

    def check_processes(self, world: int) -> None:
        """Raise BardletError where so many processes cannot share a micro-batch."""

    def with_micro_batches_of(self, rows: int, asked: int, world: int) -> Self:
        """The same step in more and smaller micro-batches.

        Args:
            rows: how many a process can take at once.
            asked: how many it would have had.
            world: processes.
        """
        raise NotImplementedError


class Rows:
    """Mixed into the settings of stages whose micro-batches are a number of rows: --batch-size."""

    batch_size: Auto[int]
    grad_accum: int
    block_size: Auto[int]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.batch_size * self.block_size * self.grad_accum

    def check_processes(self, world: int) -> None:
        """Raise BardletError where so many processes cannot share a micro-batch."""
        if self.batch_size % world:
            raise BardletError(f"--batch-size {self.batch_size} cannot be shared by {world} processes: "
                               f"take a multiple of {world}")

    def with_micro_batches_of(self, rows: int, asked: int, world: int) -> Any:
        """The same windows in more and smaller micro-batches (`Settings.with_micro_batches_of`)."""
        total = self.batch_size // world * self.grad_accum
        rows = next(n for n in range(rows, 0, -1) if total % n == 0)
        return replace(cast(Any, self), batch_size=rows * world, grad_accum=total // rows)


def flag(name: str) -> str:
    """A setting as it is typed."""
    return "--" + name.replace("_", "-")
