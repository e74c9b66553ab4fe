"""Pretraining: next-token prediction on a text."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bardlet.config.pretraining import TrainConfig
from bardlet.data import named, prefetch, shards, statistics, vocabulary
from bardlet.data import windows as data_windows
from bardlet.data.corpus import Corpus, dev_split_start
from bardlet.data.shards import TextDataset
from bardlet.data.statistics import CorpusStatistics
from bardlet.errors import BardletError, quoted
from bardlet.evaluation import metrics
from bardlet.inference import text_generation
from bardlet.planning import calibrate, clock, memory, scaling_law
from bardlet.planning import plan as planning
from bardlet.planning.calibrate import Speed
from bardlet.planning.compilation import compiled_before
from bardlet.planning.plan import Machine, Plan, TextStatistics
from bardlet.run import card, folder, hf, hub, plots
from bardlet.run.record import TextRecord
from bardlet.runtime import cache, compiler, contention, distributed, parallelize
from bardlet.runtime.seeds import torch_seed
from bardlet.stages import prediction, replay
from bardlet.stages.base import Stage, check_shape
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses, optim
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

MIN_CHARACTERS = 1_000
"""Minimum characters of a text to plan for: the memorization budget of a shorter one ends after a few steps."""

MAX_UNSEEN = 0.05
"""Share of the characters of a text that the tokenizer of --init may not know."""

SAMPLE_TOKENS = 400
"""Length of the sample of a finished run; half of it on a busy machine."""


class Pretraining(Stage[TrainConfig, Corpus, TextDataset, TextRecord]):
    """`bardlet train TEXT`."""

    material = "text"
    use = "sample"
    template = "text"
    record_class = TextRecord
    replay: replay.Replay
    decay_is_open = False
    """True if weight decay may be adapted to the number of steps."""
    distinct: int | None = None
    """Maximum size of the distinct words that BPE is trained on, in bytes."""
    at_limit = False
    """True if more steps would only memorize the text."""

    # ------------------------------------------------------------------------ the corpus

    def load_data(self) -> Corpus:
        """Find the corpus named in the settings."""
        return prefetch.find(self.config.text, self.config.field, self.config.separator, self.config.normalize)

    def tokenize(self, tokenizer: Tokenizer | None) -> TextDataset:
        """Tokenize the corpus with `tokenizer`, or with a new one if None; rank 0 writes, the other ranks read."""
        return self._tokenize(self.source, tokenizer)

    def _tokenize(self, source: Corpus, tokenizer: Tokenizer | None) -> TextDataset:
        with self.dist.main_first():
            dataset = shards.tokenize_corpus(source, tokenizer or self.config.tokenizer, self.config.vocab_size,
                                             self.progress, skip_unseen=tokenizer is not None,
                                             val_part=self.config.val_part, distinct=self.distinct)
        if dataset.skipped:
            share = dataset.skipped / (dataset.skipped + dataset.train_chars + dataset.val_chars)
            missing = (f"{source.name}: {dataset.skipped:,} characters ({share:.1%}) are not in the vocabulary of "
                       f"{self.config.init or 'this model'}")
            if share > MAX_UNSEEN:
                raise BardletError(f"{missing}; train a new model, without --init, or start from one with a bpe or "
                                   "byte tokenizer")
            log.warning("%s; skipped them", missing)
        return dataset

    def changed_text(self, record: Mapping[str, Any]) -> str | None:
        """Return the name of a text that changed since the run started, the new or the old one; None if none did."""
        return super().changed_text(record) or replay.changed_text(record)

    def parts(self, data: TextDataset | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (training, held-out) tokens of `data`, by default of the run's text.

        The development split is the last tenth of the training split. Its start is in the record of a run, which may
        be older than the tokens.
        """
        cut, record = 0, getattr(self, "record", None)
        if data is None:
            data = self.data
            cut = record.tokens if record is not None and record.text_hash == self.source.hash else 0
        if self.config.val_part == "val":
            return data.train, data.val
        cut = cut or data.dev_start or dev_split_start(len(data.train))
        return data.train[:cut], data.train[cut:]

    def held_out(self) -> tuple[np.ndarray, int, int]:
        """Return (tokens, characters, bytes) of the held-out text."""
        tokens = self.parts()[1]
        if self.config.val_part == "val":
            return tokens, self.data.val_chars, self.data.val_bytes
        return tokens, *self.data.tokenizer.measure(tokens)

    def objective(self, config: TrainConfig) -> Objective:
        """Return windows of the text, next-token loss, and the loss on the held-out text as evaluation.

        A held-out text longer than --eval-tokens is evaluated on every k-th window. The record gets `val_tokens`,
        tokens per evaluation, and `val_tokens_of`, all held-out tokens.
        """
        train_tokens, val_tokens = self.parts()
        rows = config.batch_size * config.grad_accum
        windows = data_windows.Windows(train_tokens, config.block_size, rows, config.seed)
        validation_loss, targets = self._validation(val_tokens, config)
        self.record.val_tokens, self.record.val_tokens_of = targets, len(val_tokens) - 1
        objective = Objective(windows.batch, losses.next_token_loss, losses.count_targets, validation_loss,
                              windows.describe_batch)
        if self.record.replay is None:
            return objective
        source = replay.load(self.record.replay)
        train_tokens, val_tokens = self.parts(self._tokenize(source, self.data.tokenizer))
        self.replay = replay.Replay(source.name, train_tokens, self._validation(val_tokens, config)[0])
        return self.replay.mix(objective, windows, config.replay or 0.0)

    def _validation(self, tokens: np.ndarray, config: TrainConfig) -> tuple[Callable[[Any], float], int]:
        """Return (the loss on held-out tokens as a function of a model, the number of its targets)."""
        every = -(-len(tokens) // config.eval_tokens) if config.eval_tokens else 1
        length = min(256, config.block_size)
        batches = data_windows.validation_windows(tokens, length, every=every)

        def loss(model: Any) -> float:
            rows = self.record.evaluation_rows or metrics.rows_at_once(model.config, length)
            return metrics.mean_loss(model, batches, self.dist.device, config.dtype, rows)

        return loss, sum(batch["target"].numel() for batch in batches)

    # ------------------------------------------------------------------------ a new run

    def begin(self, out: str | None, started: float, run: Path | None = None) -> Trainer:
        """Return a trainer before its first step (see `Stage.begin`). With --minutes, plan the settings left open."""
        if out is not None:
            folder.new_folder(Path(out), "")  # fail before the slow part
        config = self.config
        base = (hf.read_folder(hub.folder(config.init), config.resolved().dropout, place=self.share_of)
                if config.init else None)
        if base:
            shape = base[0].config
            check_shape(config, shape, base[1])
            replace(config, model=cast(Any, shape.model)).refuse_unused()
            config = config if not base[1].nfc else replace(config, normalize="nfc")
            base = base[0], base[1].with_nfc() if config.normalize else base[1]
            self.config = config.as_model(shape).resolved()
        else:
            config.refuse_unused()
        old_text = None if config.replay is None else replay.find(config)
        self.resolve_machine()
        self.source = self.load_data()
        plan = corpus_statistics = None
        if config.minutes is not None and base is None and config.model in planning.MODELS:
            corpus_statistics, plan = self._plan(started)
            self.config = plan.config
        else:
            self.config = self.config.resolved()
            self.data = self.tokenize(base[1] if base else None)
        if base and config.minutes is not None and self.batch_is_open:
            self.config = replace(self.config, batch_size=self._batch_for_text())
        torch.manual_seed(torch_seed(config.seed))
        if base:
            model = base[0]
        else:
            shape = self.config.model_config(self.data.tokenizer.vocab_size)
            model = self.new_model_of(shape)
        self.config = replace(self.config, text=config.text or (self.source.name,))
        self.decay_is_open = config.weight_decay is None
        self.record = self._new_record(config, corpus_statistics)
        self.record.replay = old_text
        self.source.release()
        if plan and corpus_statistics:
            self._record_plan(plan, corpus_statistics, config.set_by_user)
        elif base and config.minutes is not None and {"dropout", "weight_decay"}.isdisjoint(config.set_by_user):
            tokens = self.record.tokens
            self.record.most_steps = planning.most_steps(self.config, tokens)
            self.record.reasons = list(planning.reasons(self.config, self._text_statistics(), tokens, at_limit=False))
        trainer = self.build_trainer(self.folder(run, out, f"{self.source.name}-{self.config.model}"), model)
        if plan:  # an estimate, until the run times its own steps
            trainer.state.steps = max(1, round(plan.epochs * self.record.tokens / trainer.config.tokens_per_step))
            trainer.machine["compiled"] = plan.compiled
        if old_text:
            replay.evaluate_before(trainer)
        return trainer

    def _batch_for_text(self) -> int:
        """Return windows per batch for a base model: the default, fewer for a short text, as in `planning.plan`."""
        config, parts = self.config, self.dist.parts
        rows = min(config.batch_size, max(256, len(self.parts()[0]) // 48) // config.block_size)
        return max(1, rows // parts) * parts

    def _record_plan(self, plan: Plan[TrainConfig], measured: CorpusStatistics, set_by_user: set[str]) -> None:
        """Record the reasons of a plan, and what its prediction needs."""
        self.record.update(reasons=list(plan.reasons), most_steps=plan.most_steps)
        if blocking := scaling_law.BLOCKS_PREDICTION & set_by_user:
            self.record.untold = sorted(blocking)
        elif measured.counting:
            self.record.counting = list(measured.counting)
        if measured.drift > scaling_law.USUAL_DRIFT:
            self.record.drift = measured.drift

    def _new_record(self, config: TrainConfig, measured: CorpusStatistics | None) -> TextRecord:
        """Return the record of a new run. A short text has no bigram loss. measured: by the plan, if there is one."""
        tokens, characters, _ = self.held_out()
        if measured is None:
            with self.dist.main_first():
                measured = statistics.measure_corpus(self.source, val_part=config.val_part)
        ngram_losses = measured.losses
        return TextRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=self.data.tokenizer.kind,
            documents=self.data.documents, tokens=len(self.parts()[0]), minutes=config.minutes,
            duplicated=self.data.duplicated, leaked=self.data.leaked,
            characters_per_token=round(characters / len(tokens), 4),
            guessing=round(math.log(self.data.tokenizer.vocab_size), 4),
            bigram=round(ngram_losses[1], 4) if ngram_losses else None)

    def _plan(self, started: float) -> tuple[CorpusStatistics, Plan[TrainConfig]]:
        """Return (corpus statistics, plan) for this machine and the time left, and tokenize `data` by the plan."""
        config, dist = self.config, self.dist
        deadline = started + 60 * (config.minutes or 0)
        with dist.main_first():
            measured = statistics.measure_corpus(self.source, self.progress, val_part=config.val_part)
        if measured.characters < MIN_CHARACTERS:
            raise BardletError(shards.too_short(self.source.name, measured.characters))
        eager = calibrate.calibrate(dist, config.dtype, config.threads or 1, named.cache_folder(),
                                    clock.seconds_left(deadline, dist))
        budget = _PlanningMachine(self, deadline, eager)
        available = budget.machine(calibrate.COLD)
        config, reason = planning.plan_vocabulary(measured, available, config)
        self.config = config
        if config.tokenizer in ("auto", "bpe"):
            self.distinct = planning.distinct_words(measured, available)
        self.data = self.tokenize(None)
        if reason:
            warning = vocabulary.note_small_vocabulary(self.data.tokenizer, config.vocab_size)
            self.data = replace(self.data, reason=reason + warning)
        vocab_size = self.data.tokenizer.vocab_size
        text = self._text_statistics()
        machine = distributed.machine(dist, config.dtype, config.threads or 1)
        plan = planning.plan(text, budget.machine(calibrate.WARM), config)  # if this model's compilation is cached
        if not dist.broadcast_int(int(plan.compiled and cache.read(*compiled_before(
                plan.config, plan.config.model_config(vocab_size), machine, dist)) is not None)):
            plan = planning.plan(text, budget.machine(calibrate.COLD), config)
        if config.eval_tokens is None:
            eval_tokens = planning.evaluation_tokens(plan.config, vocab_size, clock.seconds_left(deadline, dist), eager)
            plan = replace(plan, config=replace(plan.config, eval_tokens=eval_tokens))
        if plan.compiled:
            reason = f"compiled: it takes some of the time and makes steps about {calibrate.COMPILED:g} times as fast"
            plan = replace(plan, reasons=(*plan.reasons, reason))
        speed = eager.compiled() if plan.compiled else eager
        self.estimate = plan.epochs * text.tokens * speed.seconds(planning.flops_per_token(plan.config, vocab_size))
        return measured, plan

    def _text_statistics(self) -> TextStatistics:
        """Return the size of the training split."""
        data, tokens = self.data, len(self.parts()[0])
        return TextStatistics(tokens, round(data.train_chars * tokens / len(data.train)), data.documents,
                              data.tokenizer.vocab_size, "characters" if data.tokenizer.kind == "char" else "tokens")

    def fit_to_steps(self, trainer: Trainer) -> None:
        """Adapt weight decay and the stated reasons to the timed steps. Dropout stays, since it changes the timing."""
        config = trainer.config
        if self.record.reasons is None or not isinstance(config, TrainConfig):  # the run was not planned
            return
        tokens, trained_tokens = self.record.tokens, float(trainer.state.steps * config.tokens_per_step)
        text = self._text_statistics()
        decay, _ = planning.regularization(planning.memorization(config, trained_tokens / tokens, tokens))
        if self.decay_is_open and decay != config.weight_decay:
            trainer.config = config = replace(config, weight_decay=decay)
            trainer.optimizers = optim.build(trainer.model, config, trainer.dist)
        capped = trainer.state.steps == self.record.most_steps
        self.record.reasons[:2] = planning.reasons(config, text, trained_tokens, capped)

    # ------------------------------------------------------------------------ reports

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """Return (plan summary lines, number of epochs)."""
        data = self.data
        lines = [f"text: {self.record.text}, {data.train_chars + data.val_chars:,} characters in "
                 f"{data.documents:,} document{'s' * (data.documents != 1)}", f"tokenizer: {data.reason}"]
        if self.record.replay:
            lines += replay.describe(self.config, self.record)
        return lines, self.characters_and_epochs(trainer)[1]

    def results(self) -> list[str]:
        """Return what generated text reads like, and with --replay the losses on the old text."""
        lines = prediction.results(self.record, self.data.train_chars, self.at_limit)
        return lines + (replay.results(self.record) if self.record.replay else [])

    def predict(self, trainer: Trainer) -> None:
        """Set the record's `expected`, the predicted loss in nats per character, where there is a prediction."""
        prediction.predict(self.record, trainer.state.steps, *self.characters_and_epochs(trainer))

    def prediction(self) -> str:
        """Return the predicted loss for the plan summary, or an empty string."""
        return prediction.describe(self.record, self.config.init is not None)

    def card_figures(self) -> dict[str, str]:
        """Return the size of the text and the unit of its losses for the model card."""
        return {"characters_text": f"{self.data.train_chars + self.data.val_chars:,} characters",
                "loss_unit": self.record.loss_unit}

    def characters_and_epochs(self, trainer: Trainer) -> tuple[float, float]:
        """Return (characters, epochs) of the planned steps."""
        tokens = trainer.state.steps * trainer.config.tokens_per_step
        new = 1.0 - (self.config.replay or 0.0)
        return tokens * self.data.train_chars / len(self.data.train), tokens * new / max(1, self.record.tokens)

    def measure(self, trainer: Trainer) -> str:
        """Record bits per byte, draw the curve and return text generated by the weights at the root of the run."""
        tokens, characters, size = self.held_out()
        first = self.data.tokenizer.decode([int(tokens[0])], skip_special=True)
        score = metrics.score(self.record.val_loss, len(tokens), characters, size, first)
        self.record.update(bits_per_byte=score.bits_per_byte, nats_per_char=score.nats_per_char,
                        characters=round(self.characters_and_epochs(trainer)[0]))
        self.at_limit = trainer.state.step >= (self.record.most_steps or math.inf)
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record), f"loss ({self.record.loss_unit})",
                         self.record.bigram_per_token())
        if parallelize.is_sharded(trainer.model) and not self.record.replay:  # this process has no room for all of it
            return f"(none: the processes shared the model; `bardlet sample {quoted(trainer.run)}` writes one)"
        length = SAMPLE_TOKENS if contention.slowdown() == 1 else SAMPLE_TOKENS // 2
        model, tokenizer = hf.read_folder(trainer.run)
        if self.record.replay:
            self.record.old_val_loss = self.replay.loss(model.to(self.dist.device))
            model.cpu()
        return text_generation.generate_text(model, tokenizer, None, documents=self.data.documents,
                                             tokens=length, temperature=0.8, top_k=50, seed=0)


    def sample(self, trainer: Trainer, tokens: int) -> str:
        """Return text of the current weights."""
        return text_generation.generate_text(trainer.model, self.data.tokenizer, None, documents=self.data.documents,
                                             tokens=tokens, temperature=0.8, top_k=50, seed=0)


class _PlanningMachine:
    """The time left until a deadline, and this machine's speed in it, with and without the compiler."""

    def __init__(self, stage: Pretraining, deadline: float, eager: Speed) -> None:
        self.config, self.dist, self.deadline, self.eager = stage.config, stage.dist, deadline, eager
        self.parameters = memory.max_parameters(stage.dist, stage.config.shard != "off")
        missing = compiler.compiler_missing(stage.dist.device) is not None
        self.compiler = stage.config.compile != "off" and not stage.dist.all_max(int(missing))
        self.slowdown = clock.slowdown(stage.dist)

    def machine(self, compile_seconds: float) -> Machine:
        """Return the machine to plan for, if compilation takes `compile_seconds` on a quiet machine."""
        seconds, compile_seconds = clock.seconds_left(self.deadline, self.dist), compile_seconds * self.slowdown
        compiled = self.compiler and (self.config.compile == "on"
                                      or calibrate.worth_compiling(seconds, compile_seconds))
        speed = self.eager.compiled() if compiled else self.eager
        seconds = clock.usable(max(1.0, seconds - compile_seconds) if compiled else seconds, self.slowdown)
        return Machine(seconds, speed, self.dist.parts, self.parameters, compiled, self.slowdown)
