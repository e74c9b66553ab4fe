"""Translation: a model learns each sentence's translation.

An encoder-decoder learns each target beside its source. A decoder-only model, gpt2 or qwen3, learns the same pairs in
one row, source, separator, target, with the loss on the target alone; with --prefix-lm it sees the source both ways.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet import models
from bardlet.config.pretraining import TranslationConfig
from bardlet.data import bitext, bitext_batches, corpus
from bardlet.data.batch import Batch
from bardlet.data.bitext import ParallelCorpus
from bardlet.data.bitext_batches import PairBatches, PairFormat, TokenizedLines, TokenizedPairs
from bardlet.data.corpus import development_begins
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import translate
from bardlet.planning import calibrate, clock, memory
from bardlet.planning import plan as planning
from bardlet.planning.plan import Machine, PairStatistics, Plan
from bardlet.run import card, folder, hf, plots
from bardlet.run.record import PairsRecord
from bardlet.stages.base import Stage, warn_unused
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

TRANSLATED, SHOWN = 2_000, 5
"""Held-out pairs, evenly spread, that a finished run translates; and translations on its card."""


class Translation(Stage[TranslationConfig, ParallelCorpus, TokenizedPairs, PairsRecord]):
    """`bardlet train --source F --target F`."""

    material = "pairs"
    use = "translate"
    template = "pairs"
    record_class = PairsRecord

    # ------------------------------------------------------------------------ the pairs

    def load_data(self) -> ParallelCorpus:
        """Find the pairs that the settings name."""
        return bitext.find(self.config)

    def tokenize(self, tokenizer: Tokenizer | None) -> TokenizedPairs:
        """Make tokens of the pairs, by `tokenizer` or one of their own; rank 0 writes them, the others read."""
        with self.dist.main_first():
            return bitext_batches.tokenize_pairs(self.source, tokenizer or self.config.tokenizer, self.config.vocab_size,
                                          self.progress)

    def parts(self) -> tuple[tuple[TokenizedLines, TokenizedLines], tuple[TokenizedLines, TokenizedLines]]:
        """(training, held-out) pairs. The development split is the last tenth of the training part."""
        if self.config.val_part == "val":
            return self.data.train, self.data.val
        cut = development_begins(len(self.data.train[0]))
        first, rest = (tuple(side.part(which) for side in self.data.train) for which in (slice(cut), slice(cut, None)))
        return first, rest  # type: ignore[return-value]

    def objective(self, config: TranslationConfig) -> Objective:
        """Batches of pairs of similar lengths, the loss on their targets, and that of the held-out pairs."""
        learned, held = self.parts()
        how = PairFormat(int(self.data.tokenizer.pad_id or 0), config.block_size, joined=config.model != "encdec")
        batches = PairBatches(learned, how, config.tokens_per_step, config.seed, config.grad_accum * self.dist.world)
        look_at = bitext_batches.validation_batches(held, how, TranslationConfig.batch_tokens)
        self.record.val_tokens = sum(losses.count_targets(batch) for batch in look_at)
        self.record.val_tokens_of = int(held[1].lengths.sum())
        self.record.batches = batches.batches_per_epoch
        if batches.left_out:
            log.warning("%d pairs are longer than --block-size %d and left out", batches.left_out, config.block_size)
        if not look_at:
            raise BardletError(f"all pairs that are held out are longer than --block-size {config.block_size}: "
                               "take a larger one")

        def learn(model: Any, batch: Batch) -> torch.Tensor:
            return losses.translation_loss(model, batch, config.label_smoothing, config.prefix_lm)

        def plain(model: Any, batch: Batch) -> torch.Tensor:
            return losses.translation_loss(model, batch, 0.0, config.prefix_lm)

        def validation_loss(model: Any) -> float:
            rows = self.record.evaluation_rows or metrics.ROWS
            return metrics.mean_loss(model, look_at, self.dist.device, config.dtype, rows, plain)

        return Objective(batches.batch, learn, losses.count_targets, validation_loss, batches.describe_batch, batches.widest)

    # ------------------------------------------------------------------------ a new run

    def begin(self, out: str | None, begun: float, run: Path | None = None) -> Trainer:
        """A run before its first step (`Stage.begin`). With --minutes `planning/plan.py` chooses what is open."""
        if out is not None:
            folder.new_folder(Path(out), "")  # before the long part
        config = self.config
        base = hf.read_folder(Path(config.init), config.resolved().dropout) if config.init else None
        self.resolve_machine()
        self.source = self.load_data()
        self.data = self.tokenize(base[1] if base else None)
        plan = None
        if config.minutes is not None and base is None:
            plan = self._plan(begun)
            self.config = plan.config
        torch.manual_seed(config.seed)
        if base:
            model = base[0]
            warn_unused(config, model.config)
            self.config = self.config.as_model(model.config).resolved(lr=2e-3, muon_lr=2e-2)
        else:
            self.config = self.config.resolved()
            shape = self.config.model_config(self.data.tokenizer.vocab_size)
            memory.check_weights(shape, self.dist)
            model = models.build(shape)
        run = self.folder(run, out, f"{self.source.name}-{self.config.model}")
        learned, held = self.parts()
        guessing = round(math.log(self.data.tokenizer.vocab_size), 4)
        self.record = PairsRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=self.data.tokenizer.kind,
            documents=len(learned[0]), tokens=int(learned[1].lengths.sum()), minutes=config.minutes,
            leaked=self.data.leaked, guessing=guessing,
            characters_per_token=round(self.held_out_text()[0] / int(held[1].lengths.sum()), 4))
        trainer = self.build_trainer(run, model)
        if plan:
            self.record.reasons = list(plan.reasons)
            trainer.state.steps = max(1, round(plan.epochs * self.record.batches))  # until the run has timed its own steps
        return trainer

    def _plan(self, begun: float) -> Plan[TranslationConfig]:
        """The plan for this machine and the minutes left."""
        config, dist = self.config, self.dist
        until = begun + 60 * (config.minutes or 0)
        speed = calibrate.calibrate(dist, config.dtype, config.threads or 1, corpus.cache_folder(),
                                    clock.seconds_left(until, dist))
        machine = Machine(clock.usable(clock.seconds_left(until, dist)), speed, dist.world, memory.most_parameters(dist))
        source, target = (float(side.lengths.sum()) for side in self.parts()[0])
        return planning.plan_pairs(PairStatistics(source, target, self.data.tokenizer.vocab_size), machine, config)

    # ------------------------------------------------------------------------ what is said of it

    def held_out_text(self) -> tuple[int, int]:
        """(characters, bytes) of the targets that are held out."""
        side = self.parts()[1][1]
        ids = np.concatenate([side.line(i) for i in range(len(side))]).tolist()
        text = self.data.tokenizer.decode(ids, skip_special=True)
        return len(text), len(text.encode())

    def held_out_lines(self) -> tuple[list[str], list[str]]:
        """(sources, references) that are held out, as the tokenizer writes them."""
        source, target = ([self.data.tokenizer.decode(side.line(i).tolist(), skip_special=True)
                           for i in range(len(side))] for side in self.parts()[1])
        return source, target

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """What a plan says of the pairs, and how often the planned steps read them."""
        held = len(self.parts()[1][0])
        return [f"pairs: {self.record.text}, {self.record.documents:,} to learn from, {held:,} held out",
                f"tokenizer: {self.data.reason}"], trainer.state.steps / self.record.batches

    def results(self) -> list[str]:
        """What a finished run has come to, in lines."""
        r = self.record
        return [f"held-out pairs: BLEU {r.bleu:.1f}, chrF {r.chrf:.1f} ({r.bleu_signature})"]

    def measure(self, trainer: Trainer) -> str:
        """Put BLEU and chrF of the held-out pairs on record and draw the curve; return some translations."""
        tokens = self.record.val_tokens_of
        characters, size = self.held_out_text()
        nats = self.record.val_loss * tokens
        self.record.update(nats_per_char=nats / characters, bits_per_byte=nats / math.log(2) / size)
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record))
        model, tokenizer = hf.read_folder(trainer.run)
        model.to(trainer.dist.device)
        source, reference = (side[:: -(-len(side) // TRANSLATED)] for side in self.held_out_lines())
        made = translate.translate_lines(model, tokenizer, source, translate.TranslateOptions(prefix_lm=self.config.prefix_lm))
        score = metrics.translation_score(made, reference, self.data.tokenizer.lowercase)
        self.record.update(bleu=round(score.bleu, 2), chrf=round(score.chrf, 2), bleu_signature=score.bleu_signature)
        shown = range(0, len(source), max(1, len(source) // SHOWN))[:SHOWN]
        return "\n\n".join(f"{source[i]}\n  -> {made[i]}\n     ({reference[i]})" for i in shown)
