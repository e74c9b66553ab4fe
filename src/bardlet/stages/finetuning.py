"""The base class of the stages that fine-tune a pretrained model on conversations."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from bardlet import models
from bardlet.config.finetuning import FineTuneConfig
from bardlet.config.model import ModelConfig
from bardlet.config.settings import Settings
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.models.base import LanguageModel
from bardlet.run import folder as run_folder
from bardlet.run import hf, hub
from bardlet.run.record import Record
from bardlet.runtime.seeds import torch_seed
from bardlet.stages.base import Data, R, Source, Stage
from bardlet.tokenizer import Tokenizer
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")

WIDE = 1024
"""Tokens of a context that are used in any case; a row of 8,192 takes 64 times as much for its attention."""
SMALL_DEFAULT_PLAN = 50
"""Steps of a default plan, below which it logs a warning."""

F = TypeVar("F", bound=FineTuneConfig)


class FineTuning(Stage[F, Source, Data, R]):
    """A stage that fine-tunes a pretrained model on some kind of conversations."""

    use = "chat"
    epochs: ClassVar[int] = 1
    """Default number of epochs, without --steps and --minutes."""

    def prepare_base(self, model: Any, tokenizer: Tokenizer) -> tuple[Any, Tokenizer]:
        """Return the model of --init and its tokenizer with everything that chat needs."""
        return model, tokenizer

    def place(self, empty: Any) -> Any:
        """Return the base model, still without memory, as this process's share of it; None: read it as a whole.

        References, critics and scalar heads are made from a whole model.
        """
        return None

    @abstractmethod
    def new_record(self, tokenizer: Tokenizer) -> R:
        """Return the record of a new run, with its statistics of the data."""

    def new_model(self, model: Any) -> Any:
        """Return the model to train, built from the model of --init."""
        return model

    def new_model_of(self, shape: ModelConfig) -> Any:
        """Return a new model as a whole: critics and scalar heads are built from it."""
        return models.build(shape)

    def evaluate_before(self, trainer: Trainer) -> None:
        """Record the model's results before training."""

    def begin(self, out: str | None, started: float, run: Path | None = None) -> Trainer:
        """Return a trainer before its first step (see `Stage.begin`)."""
        model, tokenizer = self.read_base(out)
        self.load(tokenizer)
        self.fit_context()
        self.record = self.new_record(tokenizer)
        run = self.folder(run, out, f"{self.source.name}-{self.config.stage}")
        trainer = self.build_trainer(run, self.new_model(model))
        self.plan_default(trainer)
        self.evaluate_before(trainer)
        return trainer

    def longest(self) -> int | None:
        """Return the tokens of the longest example, if rows are as wide as the context, whatever they hold."""
        return None

    def fit_context(self) -> None:
        """Use no more of a wide context than the examples need, unless the user set --block-size."""
        context = self.config.block_size
        if self.context_is_open and context > WIDE and (longest := self.longest()):
            self.config = replace(self.config, block_size=min(context, max(WIDE, 2 ** math.ceil(math.log2(longest)))))

    def selection_bias(self) -> list[str]:
        """Return a result line if the held-out data chose the weights, else nothing."""
        if self.record.selected_by != "best":
            return []
        return ["the held-out data chose these weights (--keep best), so the held-out figures are optimistic; "
                "--keep last avoids this"]

    def plan_default(self, trainer: Trainer) -> None:
        """Plan `epochs` epochs if neither --steps nor --minutes is given."""
        if trainer.config.steps is None and trainer.config.minutes is None:
            trainer.state.steps = self.epochs * trainer.record.batches
            if trainer.state.steps < SMALL_DEFAULT_PLAN:
                log.warning("%s is small: only %d steps in %d epoch%s; use --steps %d --keep best to train longer",
                            trainer.record.text, trainer.state.steps, self.epochs, "s" * (self.epochs > 1),
                            self.longer(trainer))
            trainer.config = replace(trainer.config, steps=trainer.state.steps)

    def read_base(self, out: str | None) -> tuple[Any, Tokenizer]:
        """Return (model, tokenizer) of --init and resolve `config` for that model.

        The tokenizer gets bardlet's chat template.

        Raises:
            BardletError: no model is named, it is not a decoder-only language model, or `out` is not empty.
        """
        config = self.config.resolved()
        if out is not None:
            run_folder.new_folder(Path(out), "")  # fail before the slow part
        if config.init is None:
            raise BardletError(f"bardlet {config.stage}: name the model to train: a run folder, or a Hugging Face "
                               "folder with a gpt2 or Llama-like model")
        stored = None if config.lora else torch.float32  # the weights that LoRA freezes may stay bf16
        model, tokenizer = hf.read_folder(hub.folder(config.init), config.dropout, dtype=stored, place=self.place)
        if not isinstance(model, LanguageModel):
            raise BardletError(f"{config.init}: a {model.config.model} model cannot be fine-tuned on conversations; "
                               "start from a gpt2 or Llama-like model")
        if chat_template.is_foreign(tokenizer):
            if reason := chat_template.reason_against(tokenizer):
                log.warning("%s: %s; this run replaces it with bardlet's", config.init, reason)
                tokenizer.chat_template = None
        elif config.stage != "sft" and tokenizer.chat_template is None:
            log.warning("%s is a base model; run `bardlet sft` on it first for better results", config.init)
        model, tokenizer = self.prepare_base(model, tokenizer)
        tokenizer.chat_template = tokenizer.chat_template or chat_template.TEMPLATE
        if config.block_size and config.block_size > model.config.block_size:
            log.warning("--block-size %d is larger than the model's context window; using %d", config.block_size,
                        model.config.block_size)
        torch.manual_seed(torch_seed(config.seed))
        self.config = config
        self.config = self.resolve_machine().as_model(model.config)
        return model, tokenizer


def check_base(config: Settings, record: Record, digest: str) -> None:
    """Record the sha256 of the --init weights. Raise BardletError if the record has a different one."""
    record.base_hash = record.base_hash or digest
    if record.base_hash != digest:
        raise BardletError(f"{config.init}: no longer the model that this run started from, which is its reference; "
                           "restore the original weights")
