"""A training stage: from the files that it learns from to a finished run.

`Stage` is what the runner knows: it loads data, makes tokens of them, has an objective, describes its plan and finishes
a run. Each of the other files here has a subclass for one stage. `FineTuning` is what those share that go on from a
model.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch

from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import SET_BY_WEIGHTS, FromScratch
from bardlet.config.settings import Settings, flag
from bardlet.data import chat_template
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.models import lora
from bardlet.models.base import LanguageModel
from bardlet.planning import clock, memory
from bardlet.planning.compilation import choose_compile, keep_compiled
from bardlet.run import card, hf
from bardlet.run import folder as run_folder
from bardlet.run.record import Record
from bardlet.runtime import device as runtime_device
from bardlet.runtime import distributed
from bardlet.runtime.distributed import Dist
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, optim
from bardlet.training.state import Objective, State, Trainer
from bardlet.training.trainer import evaluate

log = logging.getLogger("bardlet")

FEW_STEPS = 50
"""Steps of a plan that was not asked for; with fewer a notice says so."""


class NamedSource(Protocol):
    """Data as they were found: what a run puts on record of them."""

    @property
    def name(self) -> str:
        """What they are called: part of the name of the run folder."""

    @property
    def hash(self) -> str:
        """sha256 (hex) of what they hold."""


class TokenizedData(Protocol):
    """Data as tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made them."""


C = TypeVar("C", bound=Settings)
Source = TypeVar("Source", bound=NamedSource)
Data = TypeVar("Data", bound=TokenizedData)
R = TypeVar("R", bound=Record)


class Stage(ABC, Generic[C, Source, Data, R]):
    """What is learned, by the settings `config`. `load` finds `source` and makes `data` of it, its tokens.

    `record` is what run.toml says happened, from `begin` on.
    """

    material: ClassVar[str]
    """What there is to learn from, in a word."""
    unit: ClassVar[str] = "tokens"
    """What the steps count."""
    use: ClassVar[str] = ""
    """The command that uses the finished model."""
    loss_is_telling: ClassVar[bool] = True
    """Whether the curve of the training loss shows what is wrong with a run."""
    template: ClassVar[str]
    """The template of the model card, in run/templates."""

    record_class: ClassVar[type[Record]]

    source: Source
    data: Data
    record: R

    def __init__(self, config: C, dist: Dist, progress: Progress | None = None) -> None:
        self.config, self.dist, self.progress = config, dist, progress

    # ------------------------------------------------------------------------ what a stage says

    @abstractmethod
    def load_data(self) -> Source:
        """Find the files that the settings name."""

    @abstractmethod
    def tokenize(self, tokenizer: Tokenizer | None) -> Data:
        """Make tokens of `source`, by this tokenizer or one of its own; rank 0 writes them, the others read."""

    @abstractmethod
    def objective(self, config: C) -> Objective:
        """Batches, loss and evaluation. `record` gets what there is to say of them."""

    @abstractmethod
    def begin(self, out: str | None, begun: float, run: Path | None = None) -> Trainer:
        """A run before its first step. Nothing is written.

        Args:
            out: the run folder; None: runs/NAME.
            begun: when the time of --minutes began (of time.monotonic).
            run: a folder that is there already, instead of `out`: this run was in it, and begins again.
        """

    @abstractmethod
    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """(lines, epochs): what a plan says of the data, and how often the planned steps read them."""

    @abstractmethod
    def measure(self, trainer: Trainer) -> str:
        """Put what a trained model can do on record, and draw it; return a sample of it."""

    # ------------------------------------------------------------------------ with defaults

    def predict(self, trainer: Trainer) -> None:
        """Put on record what loss the planned steps should come to (`expected`), where that is known."""

    def prediction(self) -> str:
        """What the plan says of the loss to expect; empty where there is nothing to say."""
        return ""

    def results(self) -> list[str]:
        """What a finished run has come to, in lines."""
        return []

    def describe_loss(self) -> str:
        """The validation loss with its units, and over how much of the held-out data where it is not all of them."""
        r = self.record
        part = "" if r.val_tokens == r.val_tokens_of else f", over {r.val_tokens:,} of {r.val_tokens_of:,} tokens"
        return f"{r.val_loss:.4f} nats per token, {r.bits_per_byte:.4f} bits per byte{part}"

    def fit_to_steps(self, trainer: Trainer) -> None:
        """Adapt settings that depend on how many steps were planned."""

    def build_trainer(self, run: Path, model: Any, resumed: bool = False) -> Trainer:
        """A `Trainer` at step 0 that learns `data`, settings resolved: device, precision, threads, optimizers.

        resumed: the run goes on; a new one has its micro-batches cut to the size of the memory.
        """
        config, dist, record = self.resolve_machine(), self.dist, self.record
        config.check_processes(dist.world)
        model.to(dist.device)
        record.parameters = sum(x.numel() for x in model.hf_state_dict().values())
        if config.lora:
            lora.add_lora(getattr(model, "policy", model), config.lora)  # a critic, which is new, learns as a whole
            record.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        machine = distributed.machine(dist, config.dtype, config.threads or 1)
        trainer = Trainer(run, model, optim.build(model, config), self.objective(config), config, dist, machine, record,
                    State(steps=config.steps or 0, replans=list(config.replans[:1])))
        if not resumed:
            memory.fit_micro_batches(trainer)
            if trainer.config != config:  # rows are then filled up to another multiple
                self.config = cast(C, trainer.config)
                trainer.objective = self.objective(self.config)
        return trainer

    # ------------------------------------------------------------------------ the same for all

    def load(self, tokenizer: Tokenizer | None) -> None:
        """Find the data and make tokens of them."""
        self.source = self.load_data()
        self.data = self.tokenize(tokenizer)

    def resolve_machine(self) -> C:
        """`config` with device, precision and threads as this machine has them; PyTorch is told."""
        keep_compiled()
        config, device = self.config, self.dist.device
        threads = runtime_device.set_threads_and_determinism(config.threads, config.deterministic, device)
        dtype = runtime_device.pick_dtype(config.dtype, device)
        self.config = replace(config, dtype=cast(Any, dtype), threads=threads,
                              device=device.type if config.device == "auto" else config.device)
        return self.config

    def folder(self, run: Path | None, out: str | None, name: str) -> Path:
        """The run folder: that of a run that begins again, or a new one."""
        return run or run_folder.new_folder(Path(out) if out else None, name)

    def plan_steps(self, trainer: Trainer, seconds: float, begun: float) -> None:
        """Decide the number of steps and whether to compile, from a few timed steps.

        Args:
            seconds: the time of the whole run, which began at `begun` (of time.monotonic).
        """
        choose_compile(trainer, seconds - (time.monotonic() - begun))
        per_step = clock.seconds_per_step(trainer)
        began = time.monotonic()
        evaluate(trainer)
        per_evaluation = time.monotonic() - began
        left = max(0.0, seconds - (time.monotonic() - begun))
        evaluations = clock.evaluations_for(left, per_evaluation)
        steps = trainer.dist.broadcast_int(clock.steps_for(left, per_step, evaluations * per_evaluation))
        steps = min(steps, trainer.record.most_steps or steps)
        trainer.state.steps, trainer.state.replans = steps, [(0, steps)]
        if steps < 20:
            log.warning("%d steps are few: this machine is busy or slow (%.1f s a step); give it more --minutes, or a "
                        "smaller model (--n-layer, --n-embd)", steps, per_step)
        if trainer.config.eval_every is None:
            trainer.config = replace(trainer.config, eval_every=trainer.dist.broadcast_int(-(-steps // evaluations)))
        self.fit_to_steps(trainer)

    def finish(self, trainer: Trainer) -> tuple[dict[str, Any], str]:
        """Leave what a finished run has besides its weights: figures, pictures, the model card, the mark at the end.

        Returns:
            (record, sample): what run.toml says happened, and what the weights at the root of the run write.
        """
        sample = self.measure(trainer)
        self.record.finished = True
        record = checkpointing.write_run(trainer)
        card.Card(trainer.run, trainer.config, trainer.model.config, record, sample, self.describe_loss(),
                  card.title(trainer.run, self.record)).write(self.template)
        return record, sample


def warn_unused(config: FromScratch, shape: ModelConfig) -> None:
    """Say which settings of a model were chosen in vain, since the weights of --init have another shape."""
    chosen = [name for name in SET_BY_WEIGHTS if name in config.set_by_user]
    if ignored := [flag(name) for name in chosen if getattr(config, name) != getattr(shape, name, None)]:
        log.warning("%s: not used, --init %s decides it", ", ".join(ignored), config.init)


# ---------------------------------------------------------------- stages that go on from a model

F = TypeVar("F", bound=FineTuneConfig)


class FineTuning(Stage[F, Source, Data, R]):
    """A stage that goes on from a model which has learned already, and whose data are conversations of some kind."""

    use = "chat"
    epochs: ClassVar[int] = 1
    """How often the data are read where neither --steps nor --minutes says it."""

    @abstractmethod
    def new_record(self, tokenizer: Tokenizer) -> R:
        """What run.toml says of the data."""

    def new_model(self, model: Any) -> Any:
        """What is trained, from the model that --init names."""
        return model

    def evaluate_before(self, trainer: Trainer) -> None:
        """Put on record what the model can do before it learns."""

    def begin(self, out: str | None, begun: float, run: Path | None = None) -> Trainer:
        """A run before its first step (`Stage.begin`)."""
        model, tokenizer = self.read_base(out)
        self.load(tokenizer)
        self.record = self.new_record(tokenizer)
        run = self.folder(run, out, f"{self.source.name}-{self.config.stage}")
        trainer = self.build_trainer(run, self.new_model(model))
        self.plan_default(trainer)
        self.evaluate_before(trainer)
        return trainer

    def plan_default(self, trainer: Trainer) -> None:
        """Plan to read the data `epochs` times, where neither --steps nor --minutes says something else."""
        if trainer.config.steps is None and trainer.config.minutes is None:
            trainer.state.steps = self.epochs * trainer.record.batches
            if trainer.state.steps < FEW_STEPS:
                times = "once" if self.epochs == 1 else f"{self.epochs} times"
                log.warning("%s is short: to read it %s makes %d steps, which teach little; --steps 200 makes more",
                            trainer.record.text, times, trainer.state.steps)
            trainer.config = replace(trainer.config, steps=trainer.state.steps)

    def read_base(self, out: str | None) -> tuple[Any, Tokenizer]:
        """(model, tokenizer) of --init; `config` becomes what the model decides of it.

        The tokenizer gets the chat template.

        Raises:
            BardletError: no model is named, or one that cannot hold a conversation; a folder that is not free.
        """
        config = self.config.resolved()
        if out is not None:
            run_folder.new_folder(Path(out), "")  # before the long part
        if config.init is None:
            raise BardletError(f"bardlet {config.stage}: name the model that is to learn: a run folder, or a Hugging "
                               "Face folder with a gpt2 or qwen3 model")
        model, tokenizer = hf.read_folder(Path(config.init), config.dropout)
        if not isinstance(model, LanguageModel):
            raise BardletError(f"{config.init}: a {model.config.model} model does not hold conversations; "
                               "take a base of --model qwen3 or gpt2")
        if tokenizer.chat_template not in (None, chat_template.TEMPLATE):
            log.warning("%s writes conversations in another way (its chat_template); from here on in bardlet's",
                        config.init)
        elif config.stage != "sft" and tokenizer.chat_template is None:
            log.warning("%s has not learned to answer yet: `bardlet sft` first makes the better start", config.init)
        tokenizer.chat_template = chat_template.TEMPLATE
        if config.block_size and config.block_size > model.config.block_size:
            log.warning("--block-size %d: the model's window has %d tokens, and stays as it is", config.block_size,
                        model.config.block_size)
        torch.manual_seed(config.seed)
        self.config = config
        self.config = self.resolve_machine().as_model(model.config)
        return model, tokenizer


def check_base(config: Settings, record: Record, digest: str) -> None:
    """Put the sha256 of --init's weights on record. BardletError where another one is there already."""
    record.base_hash = record.base_hash or digest
    if record.base_hash != digest:
        raise BardletError(f"{config.init}: is not the model any more that the run began with, which is its reference; "
                           "put it back")
