"""Pretraining: a model learns to predict the next token of a text."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.config.settings import flag
from bardlet.data import corpus, shards, statistics
from bardlet.data import windows as data_windows
from bardlet.data.corpus import Corpus, development_begins
from bardlet.data.shards import TextDataset
from bardlet.data.statistics import CorpusStatistics
from bardlet.evaluation import metrics
from bardlet.inference import text_generation
from bardlet.planning import calibrate, clock, memory, scaling_law
from bardlet.planning import plan as planning
from bardlet.planning.calibrate import Speed
from bardlet.planning.compilation import compiled_before
from bardlet.planning.plan import Machine, Plan, TextStatistics
from bardlet.run import card, folder, hf, plots
from bardlet.run.record import TextRecord
from bardlet.runtime import cache, compiler, distributed
from bardlet.stages.base import Stage, warn_unused
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses, optim
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

SAMPLE_TOKENS = 400
"""Length of the sample that a finished run prints and its model card shows."""


class Pretraining(Stage[TrainConfig, Corpus, TextDataset, TextRecord]):
    """`bardlet train TEXT`."""

    material = "text"
    use = "sample"
    template = "text"
    record_class = TextRecord
    decay_is_open = False
    """Whether the weight decay may follow the number of steps."""

    # ------------------------------------------------------------------------ the text

    def load_data(self) -> Corpus:
        """Find the text that the settings name."""
        return corpus.find(self.config.text, self.config.field)

    def tokenize(self, tokenizer: Tokenizer | None) -> TextDataset:
        """Make tokens of the text, by `tokenizer` or one of its own; rank 0 writes them, the others read."""
        with self.dist.main_first():
            ready = shards.tokenize_corpus(self.source, tokenizer or self.config.tokenizer, self.config.vocab_size,
                                   self.progress, skip_unseen=tokenizer is not None)
        if ready.skipped:
            log.warning("%s: %d characters that the tokenizer has never seen were left out", self.source.name,
                        ready.skipped)
        return ready

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) tokens. The development split is the last tenth of the training part."""
        if self.config.val_part == "val":
            return self.data.train, self.data.val
        cut = development_begins(len(self.data.train))
        return self.data.train[:cut], self.data.train[cut:]

    def held_out(self) -> tuple[np.ndarray, int, int]:
        """(tokens, characters, bytes) of what this run does not learn from."""
        tokens = self.parts()[1]
        if self.config.val_part == "val":
            return tokens, self.data.val_chars, self.data.val_bytes
        text = self.data.tokenizer.decode(tokens.tolist(), skip_special=True)
        return tokens, len(text), len(text.encode())

    def objective(self, config: TrainConfig) -> Objective:
        """Windows of the text, next-token loss, and the loss on the held-out text as evaluation.

        A held-out text of more than --eval-tokens is looked at in every k-th window; `record` gets `val_tokens`, how
        many tokens an evaluation reads, and `val_tokens_of`, how many there are.
        """
        train_tokens, val_tokens = self.parts()
        rows = config.batch_size * config.grad_accum
        windows = data_windows.Windows(train_tokens, config.block_size, rows, config.seed)
        every = -(-len(val_tokens) // config.eval_tokens) if config.eval_tokens else 1
        length = min(256, config.block_size)
        look_at = data_windows.validation_windows(val_tokens, length, every=every)
        self.record.val_tokens = sum(batch["target"].numel() for batch in look_at)
        self.record.val_tokens_of = len(val_tokens) - 1

        def validation_loss(model: Any) -> float:
            rows = self.record.evaluation_rows or metrics.rows_at_once(model.config, length)
            return metrics.mean_loss(model, look_at, self.dist.device, config.dtype, rows)

        return Objective(windows.batch, losses.next_token_loss, losses.count_targets, validation_loss, windows.describe_batch)

    # ------------------------------------------------------------------------ a new run

    def begin(self, out: str | None, begun: float, run: Path | None = None) -> Trainer:
        """A run before its first step (`Stage.begin`). With --minutes `planning/plan.py` chooses what is open."""
        if out is not None:
            folder.new_folder(Path(out), "")  # before the long part
        config = self.config
        base = hf.read_folder(Path(config.init), config.resolved().dropout) if config.init else None
        if base:
            shape = base[0].config
            warn_unused(config, shape)
            replace(config, model=cast(Any, shape.model)).refuse_unused()
            self.config = config.as_model(shape).resolved()
        else:
            config.refuse_unused()
        self.resolve_machine()
        self.source = self.load_data()
        plan = seen = None
        if config.minutes is not None and base is None and config.model in planning.MODELS:
            seen, plan = self._plan(begun)
            self.config = plan.config
        else:
            self.config = self.config.resolved()
            self.data = self.tokenize(base[1] if base else None)
        torch.manual_seed(config.seed)
        if base:
            model = base[0]
        else:
            shape = self.config.model_config(self.data.tokenizer.vocab_size)
            memory.check_weights(shape, self.dist)
            model = models.build(shape)
        self.config = replace(self.config, text=config.text or (self.source.name,))
        self.decay_is_open = config.weight_decay is None
        self.record = self._new_record(config)
        if plan:
            self.record.update(reasons=list(plan.reasons), most_steps=plan.most_steps)
        if plan and (own := scaling_law.BLOCKS_PREDICTION & config.set_by_user):
            self.record.untold = sorted(own)
        elif seen and seen.counting:
            self.record.counting = list(seen.counting)
        trainer = self.build_trainer(self.folder(run, out, f"{self.source.name}-{self.config.model}"), model)
        if plan:  # until the run has timed its own steps
            trainer.state.steps = max(1, round(plan.epochs * self.record.tokens / trainer.config.tokens_per_step))
            trainer.machine["compiled"] = plan.compiled
        return trainer

    def _new_record(self, config: TrainConfig) -> TextRecord:
        """What run.toml says of the text; some of it is not there when the text is too short."""
        tokens, characters, _ = self.held_out()
        with self.dist.main_first():
            losses = statistics.measure_corpus(self.source, held_out=config.val_part).losses
        return TextRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=self.data.tokenizer.kind,
            documents=self.data.documents, tokens=len(self.parts()[0]), minutes=config.minutes,
            duplicated=self.data.duplicated, leaked=self.data.leaked,
            characters_per_token=round(characters / len(tokens), 4),
            guessing=round(math.log(self.data.tokenizer.vocab_size), 4),
            bigram=round(losses[1], 4) if losses else None)

    def _plan(self, begun: float) -> tuple[CorpusStatistics, Plan[TrainConfig]]:
        """(statistics of the text, plan) for this machine and the minutes left; `data` is the text as planned."""
        config, dist = self.config, self.dist
        until = begun + 60 * (config.minutes or 0)
        with dist.main_first():
            seen = statistics.measure_corpus(self.source, self.progress, held_out=config.val_part)
        eager = calibrate.calibrate(dist, config.dtype, config.threads or 1, corpus.cache_folder(),
                                    clock.seconds_left(until, dist))
        room = _PlanningMachine(self, until, eager)
        config, reason = planning.plan_vocabulary(seen, room.machine(calibrate.COLD), config)
        self.config = config
        self.data = self.tokenize(None)
        if reason:
            self.data = replace(self.data, reason=reason + shards.warn_small_vocabulary(self.data.tokenizer, config.vocab_size))
        tokens, vocabulary = len(self.parts()[0]), self.data.tokenizer.vocab_size
        characters = round(self.data.train_chars * tokens / len(self.data.train))
        text = TextStatistics(tokens, characters, self.data.documents, vocabulary)
        machine = distributed.machine(dist, config.dtype, config.threads or 1)
        plan = planning.plan(text, room.machine(calibrate.WARM), config)  # if the compiler knows the model of this plan
        if not dist.broadcast_int(int(plan.compiled and cache.read(*compiled_before(
                plan.config, plan.config.model_config(vocabulary), machine, dist)) is not None)):
            plan = planning.plan(text, room.machine(calibrate.COLD), config)
        if config.eval_tokens is None:
            looks = planning.evaluation_tokens(plan.config, vocabulary, clock.seconds_left(until, dist), eager)
            plan = replace(plan, config=replace(plan.config, eval_tokens=looks))
        if plan.compiled:
            of_compiler = ("compiled, which takes part of the time and makes steps about "
                           f"{calibrate.COMPILED:g} times as fast")
            plan = replace(plan, reasons=(*plan.reasons, of_compiler))
        return seen, plan

    def fit_to_steps(self, trainer: Trainer) -> None:
        """Have weight decay, and what is said of it, fit the steps that were timed; dropout stays, it costs time."""
        config = trainer.config
        if self.record.reasons is None or not isinstance(config, TrainConfig):  # no plan was made before the timing
            return
        tokens, learned = self.record.tokens, float(trainer.state.steps * config.tokens_per_step)
        decay, _ = planning.regularization(planning.memorization(config, learned / tokens, tokens))
        if self.decay_is_open and decay != config.weight_decay:
            trainer.config = config = replace(config, weight_decay=decay)
            trainer.optimizers = optim.build(trainer.model, config)
        enough = trainer.state.steps == self.record.most_steps
        self.record.reasons[:2] = planning.reasons(config, tokens, learned, enough)

    # ------------------------------------------------------------------------ what is said of it

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """What a plan says of the text, and how often the planned steps read it."""
        data = self.data
        lines = [f"text: {self.record.text}, {data.train_chars + data.val_chars:,} characters in "
                 f"{data.documents:,} document{'s' * (data.documents != 1)}", f"tokenizer: {data.reason}"]
        return lines, trainer.state.steps * trainer.config.tokens_per_step / max(1, self.record.tokens)

    def predict(self, trainer: Trainer) -> None:
        """Put on record what loss the planned steps should come to (`expected`, nats per character), if known."""
        if counting := self.record.counting:
            characters, epochs = self.learned(trainer)
            self.record.expected = round(scaling_law.predict_loss(counting, characters, epochs), 4)

    def prediction(self) -> str:
        """What the plan says of the loss to expect."""
        r = self.record
        if r.expected:
            return f"a validation loss of {scaling_law.describe(r.expected)}"
        if r.untold:
            what = ", ".join(map(flag, r.untold)) if len(r.untold) < 4 else "model, batch and rates"
            return f"nobody knows; a loss is foretold where bardlet chooses {what}, too"
        if r.reasons is not None:
            return "nobody knows; the text is too short to tell, or its end is unlike the rest"
        return ""

    def learned(self, trainer: Trainer) -> tuple[float, float]:
        """(characters, epochs) that the planned steps learn from: how many, and how often the text."""
        tokens = trainer.state.steps * trainer.config.tokens_per_step
        return tokens * self.data.train_chars / len(self.data.train), tokens / self.record.tokens

    def measure(self, trainer: Trainer) -> str:
        """Put bits per byte on record and draw the curve; return a text by the weights at the root."""
        tokens, characters, size = self.held_out()
        first = self.data.tokenizer.decode([int(tokens[0])], skip_special=True)
        score = metrics.score(self.record.val_loss, len(tokens), characters, size, first)
        self.record.update(bits_per_byte=score.bits_per_byte, nats_per_char=score.nats_per_char,
                        characters=round(self.learned(trainer)[0]))
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record))
        model, tokenizer = hf.read_folder(trainer.run)
        return text_generation.generate_text(model, tokenizer, None, documents=self.data.documents, tokens=SAMPLE_TOKENS,
                                     temperature=0.8, top_k=50, seed=0)


class _PlanningMachine:
    """What is left of the minutes, seen from now, with the compiler and without."""

    def __init__(self, stage: Pretraining, until: float, eager: Speed) -> None:
        self.config, self.dist, self.until, self.eager = stage.config, stage.dist, until, eager
        self.parameters = memory.most_parameters(stage.dist)
        missing = compiler.compiler_missing(stage.dist.device) is not None
        self.compiler = stage.config.compile != "off" and not stage.dist.all_max(int(missing))

    def machine(self, takes: float) -> Machine:
        """What there is to train with, if compilation takes so many seconds."""
        seconds = clock.seconds_left(self.until, self.dist)
        compiled = self.compiler and (self.config.compile == "on" or calibrate.worth_compiling(seconds, takes))
        speed = self.eager.compiled() if compiled else self.eager
        seconds = clock.usable(max(1.0, seconds - takes) if compiled else seconds)
        return Machine(seconds, speed, self.dist.world, self.parameters, compiled)
