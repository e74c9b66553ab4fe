"""The settings that all stages share: a frozen dataclass that checks its values. Nothing here imports torch.

`config/pretraining.py` and `config/finetuning.py` have a subclass for each stage, `config/model.py` has the shape of a
model. A field's docstring is its help text on the command line: `--help` shows the first sentence, `--help-all` all of
it. The `run.toml` of a run holds the resolved settings and a `[record]` of results;
`bardlet train --config run.toml` repeats the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from bardlet.config.paths import given
from bardlet.errors import BardletError

T = TypeVar("T")
AUTO: Any = None
"""The value of a setting that the plan chooses."""

if TYPE_CHECKING:
    Auto = Annotated[T, "None until resolved"]
else:

    class Auto:
        """`Auto[int]`: None until `resolved` sets an int. Type checkers see the int."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


@dataclass(frozen=True)
class Settings:
    """The settings of every training run. Each stage adds its own."""

    stage: ClassVar[str]
    """Name of the stage in run.toml."""
    command: ClassVar[str]
    """Name of the command."""
    default_minutes: ClassVar[float | None] = None
    """Time budget without --steps and --minutes; None: the size of the data sets the steps."""
    auto_defaults: ClassVar[dict[str, Any]] = {"dropout": 0.0, "weight_decay": 0.1}
    """Values of `Auto` settings that no plan chooses."""
    short_rows: ClassVar[bool] = False
    """True if the rows of a batch are sentences: attention is then a small part of the work."""
    batch_setting: ClassVar[str] = "batch_size"
    """The setting with the size of a micro-batch, in rows or tokens."""

    text: tuple[str, ...] = ()
    """Files to train on."""
    val_part: Literal["val", "dev"] = "val"
    """Held-out split: validation or development. The development split is the last tenth of the training split."""

    init: str | None = None
    """Start from the weights and tokenizer of this folder, or of OWNER/NAME on the Hugging Face Hub."""
    lora: int | None = None
    """Train LoRA factors of this rank on top of --init. The result has them merged into the weights (default: train all
    weights)."""
    block_size: Auto[int] = AUTO
    """Context window in tokens (default: the model's)."""
    dropout: Auto[float] = AUTO
    """Dropout probability (default: 0)."""

    steps: int | None = None
    """Number of optimizer steps, instead of --minutes."""
    minutes: float | None = None
    """Time budget for the whole run (default: 5)."""
    grad_accum: int = 1
    """Micro-batches per optimizer step."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices of the blocks, or AdamW for all weights. Embeddings, norms and biases always use AdamW."""
    lr: float = 2e-3
    """Peak learning rate of AdamW. For sentence pairs: 0.008, or 0.002 with --init."""
    muon_lr: float = 2e-2
    """Peak learning rate of Muon. For sentence pairs: 0.04, or 0.02 with --init."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a fraction of the peak."""
    schedule: Literal["stable-decay", "cosine", "linear", "constant"] = "stable-decay"
    """Learning-rate schedule after warmup. stable-decay: constant, then linear decay."""
    warmup_steps: int = 50
    """Warmup steps, at most a fifth of the run."""
    decay_share: float = 0.8
    """Fraction of the steps in which stable-decay decays."""
    weight_decay: Auto[float] = AUTO
    """Decoupled weight decay (default: 0.1, or chosen for --minutes in pretraining). Norms and biases have none."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    grad_clip: float = 1.0
    """Maximum gradient norm. 0 disables clipping."""

    keep: Literal["best", "last", "average"] = "best"
    """Weights to save as the result. last: the final step; average: the mean over the last fifth of the steps;
    best: the lowest validation loss among these and all evaluated steps."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Stop at a NaN or inf, or skip the step. Ten skipped steps in a row stop the run."""
    eval_every: int | None = None
    """Steps between evaluations (default: about a twentieth of the run). More steps if evaluations would take longer
    than training; 0: only at the end."""
    save_every: int | None = None
    """Steps between checkpoints (default: about a tenth of the run). 0: only at the end."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep. Older ones are deleted."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_tokens: int = 0
    """Tokens of the sample that each evaluation appends to samples.jsonl (default: no samples)."""

    seed: int = 1337
    """Random seed of weights, batches and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes an NVIDIA GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products. auto: bf16 if the processor supports it natively; fp16 on older NVIDIA GPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile. auto: if there is a compiler and the run is long enough to gain from it."""
    threads: int | None = None
    """CPU threads (default: all cores)."""
    shard: Literal["auto", "on", "off"] = "auto"
    """Several processes: each keeps a share of the weights, gradients and optimizer state, or a copy of the model.
    auto: shares if a copy would take more than half of the memory of one process."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Compute the activations of a block again in the backward pass, for a third more time, instead of keeping them.
    auto: if not even a single row fits into memory otherwise."""
    elastic: int | None = None
    """Cut each step into so many slices (default: none). The run then has the same bits on 1, 2, 4 ... up to as many
    processes, and may change their number at a resume. A power of two; threads per process must stay the same. With
    --shard on, any number of slices: the same batches and dropout on as many processes as divide it, not the bits."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU. A CPU always does."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder."""
    wandb: str | None = None
    """Log to this Weights & Biases project."""

    replans: tuple[tuple[int, int], ...] = ()
    """(step, total steps planned at that step): the decisions of the clock in the run that wrote this file."""

    def __post_init__(self) -> None:
        for name in ("init", "replay_text", "source", "target"):
            if (path := getattr(self, name, None)) is not None:
                object.__setattr__(self, name, given(path))
        object.__setattr__(self, "text", tuple(map(given, self.text)))
        self.require(lambda x: x >= 1, "at least 1", "block_size", "grad_accum", "keep_checkpoints", "log_every",
                     "lora")
        self.require(lambda x: 0 < x < math.inf, "more than 0, and finite", "steps", "minutes", "threads")
        self.require(lambda x: 0 <= x < math.inf, "0 or more, and finite", "eval_every", "save_every", "sample_tokens",
                     "warmup_steps", "weight_decay", "grad_clip", "seed")
        # beyond these limits, PyTorch and OpenMP fail with unreadable errors
        for name, maximum in (("seed", 2**63 - 1), ("threads", 1024), ("block_size", 2**24)):
            self.require(lambda x, maximum=maximum: x <= maximum, f"at most {maximum}", name)
        self.require(lambda x: 0 < x < 100, "more than 0 and below 100", "lr", "muon_lr")
        self.require(lambda x: 0 <= x < 1, "at least 0 and below 1", "dropout", "beta1", "beta2")
        self.require(lambda x: 0 <= x <= 1, "from 0 to 1", "min_lr_ratio", "decay_share")
        self.require(lambda x: 1 <= x <= 1024 and (x & (x - 1) == 0 or self.shard == "on"),
                     "a power of two, at most 1024", "elastic")
        if self.steps is not None and self.minutes is not None and not self.replans:
            raise BardletError("--steps and --minutes: give one of them, not both")

    def require(self, valid: Any, requirement: str, *names: str) -> None:
        """Raise BardletError for the first of these settings whose value fails the test `valid`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not valid(value):
                raise BardletError(f"{flag(name)} {as_typed(value)}: must be {requirement}")

    def resolved(self, *names: str, **chosen: Any) -> Self:
        """Return the settings with every open `Auto` set: from `chosen`, else from `auto_defaults`.

        names: resolve only these.
        """
        values = {**self.auto_defaults, **chosen}
        return replace(self, **{name: value for name, value in values.items()
                                if getattr(self, name) is None and (not names or name in names)})

    @property
    def set_by_user(self) -> set[str]:
        """Names of the settings that differ from their defaults, before resolution."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}

    @property
    def rows_vary(self) -> bool:
        """True if the width of the rows varies between steps."""
        return False

    @property
    def tokens_per_step(self) -> int:
        """Maximum number of tokens of the global batch."""
        raise NotImplementedError

    @property
    def samples(self) -> bool:
        """True if each evaluation samples from the model."""
        return bool(self.sample_tokens or getattr(self, "watch", False))

    def check_parts(self, parts: int) -> None:
        """Raise BardletError if a micro-batch cannot be cut evenly into parts, for processes or slices of --elastic."""

    def with_micro_batches_of(self, rows: int, unsplit_rows: int, parts: int) -> Self:
        """Return the same step split into smaller micro-batches.

        Args:
            rows: rows of a part that fit in the memory of a process.
            unsplit_rows: rows per part without the split.
            parts: parts of a micro-batch, for processes or slices of --elastic.
        """
        raise NotImplementedError


class Rows:
    """Mix-in for stages whose micro-batches have a fixed number of rows, --batch-size."""

    batch_size: Auto[int]
    grad_accum: int
    block_size: Auto[int]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.batch_size * self.block_size * self.grad_accum

    def check_parts(self, parts: int) -> None:
        """Raise BardletError if a micro-batch cannot be cut evenly into parts, for processes or slices of --elastic."""
        if self.batch_size % parts:
            raise BardletError(f"--batch-size {self.batch_size} does not divide among {parts} processes or slices; "
                               f"use a multiple of {parts}")

    def with_micro_batches_of(self, rows: int, unsplit_rows: int, parts: int) -> Any:
        """Return the same windows in smaller micro-batches (`Settings.with_micro_batches_of`)."""
        total = self.batch_size // parts * self.grad_accum
        rows = next(n for n in range(rows, 0, -1) if total % n == 0)
        return replace(cast(Any, self), batch_size=rows * parts, grad_accum=total // rows)


def as_typed(value: Any) -> Any:
    """Return a value as a user types it in a message: 1 for 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flag(name: str) -> str:
    """Return the flag of a setting: n_layer -> --n-layer."""
    return "--" + name.replace("_", "-")
