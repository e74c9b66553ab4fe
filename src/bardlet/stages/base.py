"""The base class of the training stages: what the runner calls, from input files to a finished run."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import SET_BY_WEIGHTS, FromScratch
from bardlet.config.settings import Settings, flag
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.models import lora
from bardlet.planning import calibrate, clock, memory, sharding
from bardlet.planning.compilation import choose_compile, keep_compiled
from bardlet.run import card, hf
from bardlet.run import folder as run_folder
from bardlet.run.record import Record
from bardlet.runtime import device as runtime_device
from bardlet.runtime import distributed, parallelize, shared_init
from bardlet.runtime.distributed import Dist
from bardlet.runtime.turns import shared_by
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, optim, saving
from bardlet.training.state import Objective, State, Trainer
from bardlet.training.trainer import evaluate

log = logging.getLogger("bardlet")

MANY_EPOCHS = 40
"""Most epochs of a few examples in the advice to train longer: 56 conversations were memorized after 80."""


class NamedSource(Protocol):
    """Input data before tokenization, with the fields that go into the record of a run."""

    @property
    def name(self) -> str:
        """Display name, part of the run folder's name."""

    @property
    def hash(self) -> str:
        """sha256 (hex) of the contents."""


class TokenizedData(Protocol):
    """Tokenized data."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that produced the tokens."""


C = TypeVar("C", bound=Settings)
Source = TypeVar("Source", bound=NamedSource)
Data = TypeVar("Data", bound=TokenizedData)
R = TypeVar("R", bound=Record)


class Stage(ABC, Generic[C, Source, Data, R]):
    """A training stage configured by `config`. `load` reads `source` and tokenizes it into `data`.

    `begin` creates `record`, the [record] section of run.toml.
    """

    material: ClassVar[str]
    """A word for the training data, used in the plan."""
    unit: ClassVar[str] = "tokens"
    """The unit that training throughput is counted in."""
    use: ClassVar[str] = ""
    """The command that uses the finished model."""
    validation_label: ClassVar[str] = "validation loss"
    """The name of the figure that `describe_loss` formats."""
    loss_is_telling: ClassVar[bool] = True
    """True if the training loss curve can reveal problems with a run."""
    template: ClassVar[str]
    """The model card's template in run/templates."""

    record_class: ClassVar[type[Record]]

    source: Source
    data: Data
    record: R
    taken: Path | None = None
    """The run folder that this run would have, but that exists."""
    estimate: float | None = None
    """Estimated seconds from the plan to the end of a timed run."""

    def __init__(self, config: C, dist: Dist, progress: Progress | None = None) -> None:
        self.config, self.dist, self.progress = config, dist, progress
        self.batch_is_open = not {config.batch_setting, "grad_accum"} & config.set_by_user
        self.context_is_open = "block_size" not in config.set_by_user

    # ------------------------------------------------------------------------ defined by every stage

    @abstractmethod
    def load_data(self) -> Source:
        """Find the files named in the settings."""

    @abstractmethod
    def tokenize(self, tokenizer: Tokenizer | None) -> Data:
        """Tokenize `source` with `tokenizer`, or with a new one if None; rank 0 writes, the other ranks read."""

    @abstractmethod
    def objective(self, config: C) -> Objective:
        """Return batches, loss and evaluation, and fill in `record`."""

    @abstractmethod
    def begin(self, out: str | None, started: float, run: Path | None = None) -> Trainer:
        """Return a trainer before its first step. Writes nothing.

        Args:
            out: the run folder; None: runs/NAME.
            started: start of the --minutes budget (time.monotonic).
            run: an existing folder, used instead of `out`, whose run restarts from step 0.
        """

    @abstractmethod
    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """Return (plan summary lines, number of epochs)."""

    @abstractmethod
    def measure(self, trainer: Trainer) -> str:
        """Evaluate the trained model into `record`, draw the figures and return a sample."""

    # ------------------------------------------------------------------------ with defaults

    def sample(self, trainer: Trainer, tokens: int) -> str:
        """Return a text of at most `tokens` tokens from the current weights, always of one seed; or nothing."""
        return ""

    def changed_text(self, record: Mapping[str, Any]) -> str | None:
        """Return the name of a text that changed since the run with this record started; None if none did."""
        return self.source.name if self.source.hash != record.get("text_hash") else None

    def predict(self, trainer: Trainer) -> None:
        """Set the record's `expected`, the predicted loss of the planned steps, where there is a prediction."""

    def prediction(self) -> str:
        """Return the predicted loss for the plan summary, or an empty string."""
        return ""

    def results(self) -> list[str]:
        """Return the result lines of a finished run."""
        return []

    @staticmethod
    def longer(trainer: Trainer) -> int:
        """Return steps for a longer run than the default: 200, but not many times over the same few examples."""
        return int(min(200, MANY_EPOCHS * trainer.record.batches))

    def unready(self) -> bool:
        """Return True if the trained model cannot do yet what `use` would ask of it."""
        return False

    def describe_loss(self) -> str:
        """Return the validation loss in its units, and how many of the held-out tokens it covers if not all."""
        r = self.record
        part = "" if r.val_tokens == r.val_tokens_of else f", over {r.val_tokens:,} of {r.val_tokens_of:,} tokens"
        return f"{metrics.describe_loss(r.val_loss, r.nats_per_char)}, {r.bits_per_byte:z.4f} bits per byte{part}"

    def card_figures(self) -> dict[str, str]:
        """Return formatted figures for the model card, in addition to the record."""
        return {}

    def fit_to_steps(self, trainer: Trainer) -> None:
        """Adapt the settings that depend on the planned number of steps."""

    def new_model_of(self, shape: ModelConfig) -> Any:
        """Return a new model, initialized from torch's generator; if it is to be shared, this process's share of it.

        Raises BardletError if it cannot be trained here.
        """
        memory.check_weights(shape, self.dist, shared=self.config.shard != "off" and not self.dist.slices)
        empty = hf.empty_model(shape, torch.float32)
        ranks = sharding.ranks_per_copy(self.config, empty, self.dist)
        # LoRA's factors belong to whole matrices
        if ranks == 1 or self.config.lora or parallelize.has_unknown_buffers(empty):
            return models.build(shape)
        return shared_init.build(lambda: models.build(shape), self.dist, self._dtype(), ranks)

    def share_of(self, empty: Any) -> Any:
        """Return a model without memory as this process's share of it, not yet initialized; None: it is not shared."""
        ranks = 1 if self.config.lora else sharding.ranks_per_copy(self.config, empty, self.dist)
        if ranks == 1:
            return None
        parallelize.shard(empty, self.dist, self._dtype(), ranks)
        return parallelize.materialize(empty, self.dist.device)

    def _dtype(self) -> str:
        """Return the precision of products, fp32 or bf16, before the machine is resolved."""
        return runtime_device.pick_dtype(self.config.dtype, self.dist.device)

    def build_trainer(self, run: Path, model: Any, resumed: bool = False) -> Trainer:
        """Return a `Trainer` at step 0, with device, precision, threads and optimizers resolved.

        resumed: the run continues from a checkpoint; only a new run splits its micro-batches to fit into memory.
        """
        config, dist, record = self.resolve_machine(), self.dist, self.record
        config.check_parts(dist.parts)
        model.to(dist.device)
        record.parameters = sum(x.numel() for x in model.hf_state_dict().values())
        if config.lora:
            lora.add_lora(getattr(model, "policy", model), config.lora)  # a critic is new, so all its weights train
            record.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not getattr(config, "bias", True):
            optim.freeze_biases(model)
        if config.shard == "on" and dist.world == 1:
            log.warning("--shard on: there is one process, so nothing is shared; start several with torchrun")
        ranks = 1 if parallelize.is_sharded(model) else sharding.ranks_per_copy(config, model, dist)
        if ranks > 1:
            parallelize.shard(model, dist, config.dtype, ranks)
        if config.recompute == "on":
            parallelize.recompute(model)
        machine = distributed.machine(dist, config.dtype, config.threads or 1)
        optimizers = optim.build(model, config, dist)
        trainer = Trainer(run, model, optimizers, self.objective(config), config, dist, machine, record,
                          State(steps=config.steps or 0, replans=list(config.replans[:1])))
        if parallelize.is_sharded(model):
            runtime_device.return_large_blocks()
            trainer.saver = saving.Saver(dist)
        if not resumed:
            memory.fit_micro_batches(trainer)
            if trainer.config != config:  # the objective pads batches to a multiple of the micro-batches
                self.config = cast(C, trainer.config)
                trainer.objective = self.objective(self.config)
        return trainer

    # ------------------------------------------------------------------------ shared by all stages

    def load(self, tokenizer: Tokenizer | None) -> None:
        """Load and tokenize the data."""
        self.source = self.load_data()
        self.data = self.tokenize(tokenizer)

    def resolve_machine(self) -> C:
        """Resolve device, precision and threads for this machine, configure PyTorch, and return the new `config`."""
        keep_compiled()
        config, device = self.config, self.dist.device
        threads = runtime_device.set_threads_and_determinism(config.threads, config.deterministic, device)
        dtype = runtime_device.pick_dtype(config.dtype, device)
        self.config = replace(config, dtype=cast(Any, dtype), threads=threads,
                              device=device.type if config.device == "auto" else config.device)
        return self.config

    def folder(self, run: Path | None, out: str | None, name: str) -> Path:
        """Return the run folder: `run` if a run restarts, else a new one."""
        if run is None and out is None and (first := Path("runs", name)).exists():
            self.taken = first
        return run or run_folder.new_folder(Path(out) if out else None, name)

    def plan_steps(self, trainer: Trainer, seconds: float, started: float, compiling: bool = True) -> None:
        """Time a few steps, then choose the number of steps and whether to compile.

        Args:
            seconds: time budget of the whole run, which started at `started` (time.monotonic).
            compiling: False: do not compile, and estimate how fast compiled steps would be.
        """
        self._fit_batch(trainer, seconds - (time.monotonic() - started))
        choose_compile(trainer, seconds - (time.monotonic() - started), compiling)
        per_step = clock.seconds_per_step(trainer, patience=min(5.0, clock.TIMING * seconds))
        if not compiling and trainer.machine["compiled"]:
            per_step /= calibrate.COMPILED_PAIRS if trainer.config.short_rows else calibrate.COMPILED
        evaluation_started = time.monotonic()
        with shared_by(self.dist):
            evaluate(trainer)
        per_evaluation = time.monotonic() - evaluation_started
        remaining = max(0.0, seconds - (time.monotonic() - started))
        evaluations = clock.evaluations_for(remaining, per_evaluation)
        slowdown = clock.slowdown(trainer.dist)
        steps = trainer.dist.broadcast_int(
            clock.steps_for(remaining, per_step, evaluations * per_evaluation, slowdown))
        steps = min(steps, trainer.record.most_steps or steps)
        trainer.state.steps, trainer.state.replans = steps, [(0, steps)]
        self.estimate = steps * per_step + evaluations * per_evaluation + clock.FINISHING * slowdown
        if steps < 20 and slowdown == 1:
            log.warning("time for only %s, at %.1f s per step; give more --minutes, or choose a smaller model "
                        "(--n-layer, --n-embd)", f"{steps} step{'s' * (steps != 1)}", per_step)
        if trainer.config.eval_every is None:
            trainer.config = replace(trainer.config, eval_every=trainer.dist.broadcast_int(-(-steps // evaluations)))
        self.fit_to_steps(trainer)

    def _fit_batch(self, trainer: Trainer, seconds: float) -> None:
        """Halve a batch that the user left open until the time is enough, by timing one or two steps."""
        if not self.batch_is_open or trainer.objective.period > 1:
            return
        config, parts, seconds = trainer.config, self.dist.parts, max(1.0, seconds)
        per_step = clock.seconds_per_step(trainer, 1, patience=0.0)
        if trainer.dist.broadcast_int(int(seconds < clock.HALVE_BATCH_BELOW * per_step)):  # a first step is slow
            per_step = clock.seconds_per_step(trainer, 1, patience=seconds / clock.HALVE_BATCH_BELOW)
        name = config.batch_setting
        batch = smallest = getattr(config, name)
        while smallest % (2 * parts) == 0 and (config.tokens_per_step * smallest // batch > clock.MIN_TOKENS
                                               and seconds * batch < clock.HALVE_BATCH_BELOW * per_step * smallest):
            smallest //= 2
        if (smallest := trainer.dist.broadcast_int(smallest)) < batch:
            trainer.config = self.config = cast(C, replace(config, **cast(Any, {name: smallest})))
            trainer.objective = self.objective(self.config)

    def finish(self, trainer: Trainer) -> tuple[dict[str, Any], str]:
        """Measure the finished run, write its figures and model card, and mark it finished.

        Returns:
            (record, sample): the [record] of run.toml, and output of the weights at the root of the run.
        """
        sample = self.measure(trainer)
        self.record.finished = True
        record = checkpointing.write_run(trainer)
        card.Card(trainer.run, trainer.config, trainer.model.config, record | self.card_figures(), sample,
                  self.describe_loss(), card.title(trainer.run, self.record)).write(self.template)
        return record, sample


AnyStage = Stage[Any, Any, Any, Any]


def check_shape(config: FromScratch, shape: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise BardletError if a model setting contradicts the weights or the tokenizer of --init."""
    known = {**vars(shape), "tokenizer": tokenizer.kind}
    for name in SET_BY_WEIGHTS:
        value = getattr(config, name)
        # --vocab-size is a maximum: the tokenizer of a short text has fewer tokens
        if name in config.set_by_user and name != "vocab_size" and value != known[name]:
            setting = f"--no-{name.replace('_', '-')}" if value is False else f"{flag(name)} {value}"
            raise BardletError(f"{setting}: --init {config.init} has {name} = {str(known[name]).lower()}, and training "
                               f"cannot change it; drop {setting.split()[0]}")
