"""Translation: learn sentence pairs.

An encoder-decoder gets source and target separately. A decoder-only model gets both in one row: source,
separator, target. The loss covers the target alone. With --prefix-lm, attention over the source is bidirectional.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet.config.pretraining import TranslationConfig
from bardlet.data import bitext, bitext_batches, named
from bardlet.data.batch import Batch
from bardlet.data.bitext import ParallelCorpus
from bardlet.data.bitext_batches import PairBatches, PairFormat, TokenizedLines, TokenizedPairs
from bardlet.data.corpus import dev_split_start
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import translate
from bardlet.planning import calibrate, clock, memory
from bardlet.planning import plan as planning
from bardlet.planning.plan import Machine, PairStatistics, Plan
from bardlet.run import card, folder, hf, hub, plots
from bardlet.run.record import PairsRecord
from bardlet.runtime.seeds import torch_seed
from bardlet.stages.base import Stage, check_shape
from bardlet.tokenizer import Tokenizer
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

EVAL_PAIRS, SAMPLES = 2_000, 5
"""Held-out pairs, evenly spread, that a finished run translates, at most, and the translations in its sample."""


class Translation(Stage[TranslationConfig, ParallelCorpus, TokenizedPairs, PairsRecord]):
    """`bardlet train --source F --target F`."""

    material = "pairs"
    use = "translate"
    template = "pairs"
    record_class = PairsRecord

    # ------------------------------------------------------------------------ the pairs

    def load_data(self) -> ParallelCorpus:
        """Find the parallel corpus named in the settings."""
        return bitext.find(self.config)

    def tokenize(self, tokenizer: Tokenizer | None) -> TokenizedPairs:
        """Tokenize the pairs with `tokenizer`, or with a new one if None; rank 0 writes, the other ranks read."""
        with self.dist.main_first():
            return bitext_batches.tokenize_pairs(self.source, tokenizer or self.config.tokenizer,
                                                 self.config.vocab_size, self.progress)

    def parts(self) -> tuple[tuple[TokenizedLines, TokenizedLines], tuple[TokenizedLines, TokenizedLines]]:
        """Return (training, held-out) pairs. The development split is the last tenth of the training split."""
        if self.config.val_part == "val":
            return self.data.train, self.data.val
        cut = dev_split_start(len(self.data.train[0]))
        first, rest = (tuple(side.part(span) for side in self.data.train) for span in (slice(cut), slice(cut, None)))
        return first, rest  # type: ignore[return-value]

    def objective(self, config: TranslationConfig) -> Objective:
        """Return batches of pairs of similar length, the loss on the targets, and the held-out loss as evaluation."""
        train, validation = self.parts()
        pair_format = PairFormat(int(self.data.tokenizer.pad_id or 0), config.block_size,
                                 joined=config.model != "encdec")
        batches = PairBatches(train, pair_format, config.tokens_per_step, config.seed,
                              config.grad_accum * self.dist.parts)
        eval_batches = bitext_batches.validation_batches(validation, pair_format, TranslationConfig.batch_tokens)
        self.record.val_tokens = sum(losses.count_targets(batch) for batch in eval_batches)
        self.record.val_tokens_of = int(validation[1].lengths.sum())
        self.record.batches = batches.batches_per_epoch
        if batches.left_out:
            log.warning("left out %d pairs longer than --block-size %d", batches.left_out, config.block_size)
        if not eval_batches:
            raise BardletError(f"all held-out pairs are longer than --block-size {config.block_size}; use a larger one")

        def training_loss(model: Any, batch: Batch) -> torch.Tensor:
            return losses.translation_loss(model, batch, config.label_smoothing, config.prefix_lm)

        def unsmoothed_loss(model: Any, batch: Batch) -> torch.Tensor:
            return losses.translation_loss(model, batch, 0.0, config.prefix_lm)

        def validation_loss(model: Any) -> float:
            rows = self.record.evaluation_rows or metrics.ROWS
            return metrics.mean_loss(model, eval_batches, self.dist.device, config.dtype, rows, unsmoothed_loss)

        return Objective(batches.batch, training_loss, losses.count_targets, validation_loss, batches.describe_batch,
                         batches.widest)

    # ------------------------------------------------------------------------ a new run

    def begin(self, out: str | None, started: float, run: Path | None = None) -> Trainer:
        """Return a trainer before its first step (see `Stage.begin`). With --minutes, plan the settings left open."""
        if out is not None:
            folder.new_folder(Path(out), "")  # fail before the slow part
        config = self.config
        base = (hf.read_folder(hub.folder(config.init), config.resolved().dropout, place=self.share_of)
                if config.init else None)
        if base:
            check_shape(config, base[0].config, base[1])
        self.resolve_machine()
        self.source = self.load_data()
        self.data = self.tokenize(base[1] if base else None)
        plan = None
        if config.minutes is not None and base is None:
            plan = self._plan(started)
            self.config = plan.config
        torch.manual_seed(torch_seed(config.seed))
        if base:
            model = base[0]
            self.config = self.config.as_model(model.config).resolved(lr=2e-3, muon_lr=2e-2)
        else:
            self.config = self.config.resolved()
            shape = self.config.model_config(self.data.tokenizer.vocab_size)
            model = self.new_model_of(shape)
        run = self.folder(run, out, f"{self.source.name}-{self.config.model}")
        train, validation = self.parts()
        guessing = round(math.log(self.data.tokenizer.vocab_size), 4)
        self.record = PairsRecord(
            text=self.source.name, text_hash=self.source.hash, tokenizer=self.data.tokenizer.kind,
            documents=len(train[0]), tokens=int(train[1].lengths.sum()), minutes=config.minutes,
            leaked=self.data.leaked, guessing=guessing,
            characters_per_token=round(self.held_out_text()[0] / int(validation[1].lengths.sum()), 4))
        trainer = self.build_trainer(run, model)
        if plan:  # an estimate, until the run times its own steps
            self.record.reasons = list(plan.reasons)
            trainer.state.steps = max(1, round(plan.epochs * self.record.batches))
        return trainer

    def _plan(self, started: float) -> Plan[TranslationConfig]:
        """Return the plan for this machine and the time left."""
        config, dist = self.config, self.dist
        deadline = started + 60 * (config.minutes or 0)
        speed = calibrate.calibrate(dist, config.dtype, config.threads or 1, named.cache_folder(),
                                    clock.seconds_left(deadline, dist))
        seconds = clock.usable(clock.seconds_left(deadline, dist), clock.slowdown(dist))
        machine = Machine(seconds, speed, dist.parts, memory.max_parameters(dist, config.shard != "off"))
        source, target = (float(side.lengths.sum()) for side in self.parts()[0])
        return planning.plan_pairs(PairStatistics(source, target, self.data.tokenizer.vocab_size), machine, config)

    # ------------------------------------------------------------------------ reports

    def held_out_text(self) -> tuple[int, int]:
        """Return (characters, bytes) of the held-out targets."""
        targets = self.parts()[1][1]
        ids = np.concatenate([targets.line(i) for i in range(len(targets))]).tolist()
        text = self.data.tokenizer.decode(ids, skip_special=True)
        return len(text), len(text.encode())

    def held_out_lines(self) -> tuple[list[str], list[str]]:
        """Return the held-out (sources, references), as the tokenizer decodes them."""
        sources, references = ([self.data.tokenizer.decode(side.line(i).tolist(), skip_special=True)
                                for i in range(len(side))] for side in self.parts()[1])
        return sources, references

    def describe(self, trainer: Trainer) -> tuple[list[str], float]:
        """Return (plan summary lines, number of epochs)."""
        validation_pairs = len(self.parts()[1][0])
        return [f"pairs: {self.record.text}, {self.record.documents:,} for training, {validation_pairs:,} held out",
                f"tokenizer: {self.data.reason}"], trainer.state.steps / self.record.batches

    def results(self) -> list[str]:
        """Return the result lines of a finished run."""
        r = self.record
        return [f"held-out pairs: BLEU {r.bleu:.1f}, chrF {r.chrf:.1f} ({r.bleu_signature})"]

    def measure(self, trainer: Trainer) -> str:
        """Record BLEU and chrF on held-out pairs, draw the curve and return some translations."""
        tokens = self.record.val_tokens_of
        characters, size = self.held_out_text()
        nats = self.record.val_loss * tokens
        self.record.update(nats_per_char=nats / characters, bits_per_byte=nats / math.log(2) / size)
        plots.loss_curve(trainer.run, card.title(trainer.run, self.record))
        model, tokenizer = hf.read_folder(trainer.run)
        model.to(trainer.dist.device)
        sources, references = (side[:: -(-len(side) // EVAL_PAIRS)] for side in self.held_out_lines())
        options = translate.TranslateOptions(prefix_lm=self.config.prefix_lm)
        translations = translate.translate_lines(model, tokenizer, sources, options)
        score = metrics.translation_score(translations, references, self.data.tokenizer.lowercase)
        self.record.update(bleu=round(score.bleu, 2), chrf=round(score.chrf, 2), bleu_signature=score.bleu_signature)
        samples = range(0, len(sources), max(1, len(sources) // SAMPLES))[:SAMPLES]
        return "\n\n".join(f"{sources[i]}\n  -> {translations[i]}\n     ({references[i]})" for i in samples)

    def sample(self, trainer: Trainer, tokens: int) -> str:
        """Return translations of held-out lines by the current weights."""
        lines = self.held_out_lines()[0]
        lines = lines[:: max(1, len(lines) // SAMPLES)][:SAMPLES]
        options = translate.TranslateOptions(prefix_lm=self.config.prefix_lm)
        translations = translate.translate_lines(trainer.model, self.data.tokenizer, lines, options)
        return "\n\n".join(f"{source}\n  -> {text}" for source, text in zip(lines, translations, strict=True))
