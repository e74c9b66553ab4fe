"""Translation as a stage: pairs of sentences become a `Trainer`, by the names that `stages/pretrain.py` has, too.

An encoder-decoder learns each target beside its source. A decoder-only model, gpt2 or qwen3, learns the same pairs in
one row, source, separator, target, with the loss on the target alone; with --prefix-lm it sees the source both ways.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet import models
from bardlet.config.settings import TrainConfig
from bardlet.data import batch as data_batch
from bardlet.data import bitext, bitext_batches, corpus, shards
from bardlet.data.bitext import Parallel
from bardlet.data.bitext_batches import Format, Lines, PairBatches, PreparedPairs
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import translate
from bardlet.planning import calibrate, clock, memory, plan
from bardlet.planning.calibrate import Speed
from bardlet.run import card, folder, hf, plots
from bardlet.runtime.distributed import Dist
from bardlet.stages import base as stages_base
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, losses
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

RECIPE: dict[str, Any] = {"label_smoothing": 0.1}
"""What pairs are best learned with, where nobody said otherwise (LOG.md has the runs)."""
FROM_SCRATCH: dict[str, Any] = {"block_size": 256, "lr": 8e-3, "muon_lr": 4e-2}
"""The same, of a model that has learned nothing yet."""
SHAPES = ((2, 2, 64), (2, 4, 128), (3, 4, 128), (3, 4, 192), (3, 4, 256), (4, 6, 384), (6, 8, 512))
"""The models to choose from for --minutes, as layers (of encoder and decoder each), heads and channels."""
TOKENS_PER_WEIGHT, WEIGHTS_PER_TOKEN = 0.7, 15.0
"""The largest model is taken that learns from so many target tokens for each of its weights, and that has no more
weights than so many for each target token there is. On two cores, Multi30k de-en, BLEU of the validation part: in one
minute 33.1 with 1.3 tokens for each weight, 28.7 with 0.2; in five 40.5 with 0.9, 39.9 with 2.5."""
DROPOUTS = ((4, 0.1), (25, 0.2), (math.inf, 0.3))
"""(most epochs, dropout)."""
TRANSLATED, SHOWN = 2_000, 5
"""Held-out pairs, evenly spread, that a finished run translates; and translations on its card."""


def find(config: TrainConfig) -> Parallel:
    """The pairs that the settings name."""
    return bitext.find(config)


def prepare(found: Parallel, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: shards.Progress | None = None) -> PreparedPairs:
    """The pairs as tokens, by `words` or a tokenizer of their own; rank 0 makes them, the others read what it made."""
    with dist.main_first():
        return bitext_batches.prepare(found, words or config.tokenizer, config.vocab_size, progress)


def parts(ready: PreparedPairs, config: TrainConfig) -> tuple[tuple[Lines, Lines], tuple[Lines, Lines]]:
    """(training, held-out) pairs. The development split is the last tenth of the training part."""
    if config.val_part == "val":
        return ready.train, ready.val
    cut = int(0.9 * len(ready.train[0]))
    first, rest = (tuple(side.part(which) for side in ready.train) for which in (slice(cut), slice(cut, None)))
    return first, rest  # type: ignore[return-value]


def format_of(config: TrainConfig, words: Tokenizer) -> Format:
    """How pairs become the tensors that this model wants."""
    return Format(int(words.pad_id or 0), config.block_size, joined=config.model != "encdec")


def pair_objective(ready: PreparedPairs, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Objective:
    """Batches of pairs of similar lengths, the loss on their targets, and that of the held-out pairs as evaluation."""
    learned, held = parts(ready, config)
    how = format_of(config, ready.tokenizer)
    batches = PairBatches(learned, how, config.tokens_per_step, config.seed, config.grad_accum * dist.world)
    look_at = bitext_batches.held_out(held, how, TrainConfig.batch_tokens)
    record["val_tokens"] = sum(losses.count_targets(batch) for batch in look_at)
    record["val_tokens_of"] = int(held[1].lengths.sum())
    record["batches"] = batches.batches_per_epoch
    if batches.left_out:
        log.warning("%d pairs are longer than --block-size %d and left out", batches.left_out, config.block_size)
    if not look_at:
        raise BardletError(f"all pairs that are held out are longer than --block-size {config.block_size}: "
                           "take a larger one")

    def learn(model: Any, batch: data_batch.Batch) -> torch.Tensor:
        return losses.translation(model, batch, config.label_smoothing, config.prefix_lm)

    def plain(model: Any, batch: data_batch.Batch) -> torch.Tensor:
        return losses.translation(model, batch, 0.0, config.prefix_lm)

    def validation_loss(model: Any) -> float:
        rows = record.get("evaluation_rows") or metrics.ROWS
        return metrics.mean_loss(model, look_at, dist.device, config.dtype, rows, plain)

    return Objective(batches.batch, learn, losses.count_targets, validation_loss, batches.place, batches.widest)


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: shards.Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, PreparedPairs]:
    """Pairs, tokenizer, model and optimizers for `config`: a run that has not begun. Arguments: `pretrain`'s."""
    begun = time.monotonic() if begun is None else begun
    if out is not None:
        folder.new_folder(Path(out), "")  # before the long part
    base = hf.read_folder(Path(config.init), config.dropout) if config.init else None
    if not base and (unused := config.unused(given)):
        log.warning("%s: not used, a run on pairs does not have that", ", ".join(unused))
    if run is None:  # one that begins again has its settings
        recipe = RECIPE if base else RECIPE | FROM_SCRATCH
        config = replace(config, **{name: value for name, value in recipe.items() if name not in {*given, *in_file}})
    config = stages_base.settled(config, dist)
    found = find(config)
    ready = prepare(found, config, base[1] if base else None, dist, progress)
    reasons: list[str] = []
    if config.minutes is not None and base is None:
        left = clock.left(begun + 60 * config.minutes, dist)
        speed = calibrate.calibrate(dist, config.dtype, config.threads or 1, corpus.cache_folder(), left)
        left = clock.usable(clock.left(begun + 60 * config.minutes, dist))
        config, epochs, reasons = chosen(config, {*given, *in_file}, ready, left, speed, memory.most_parameters(dist))
    torch.manual_seed(config.seed)
    if base:
        model = base[0]
        config = stages_base.as_model(config, model.config, given)
    else:
        shape = config.model_config(ready.tokenizer.vocab_size)
        memory.check_weights(shape, dist)
        model = models.build(shape)
    run = run or folder.new_folder(Path(out) if out else None, f"{found.name}-{config.model}")
    learned, held = parts(ready, config)
    record: dict[str, Any] = {
        "text": found.name, "text_hash": found.hash, "tokenizer": ready.tokenizer.kind,
        "documents": len(learned[0]), "tokens": int(learned[1].lengths.sum()), "minutes": config.minutes,
        "leaked": ready.leaked, "guessing": round(math.log(ready.tokenizer.vocab_size), 4),
        "characters_per_token": round(held_out_text(ready, config)[0] / int(held[1].lengths.sum()), 4)}
    t = assemble(run, model, ready, config, dist, record)
    if reasons:
        record["reasons"] = reasons
        t.state.steps = max(1, round(epochs * record["batches"]))  # until the run has timed its own steps
    return t, ready


def chosen(config: TrainConfig, given: Collection[str], ready: PreparedPairs, seconds: float,
           speed: Speed, most_parameters: float = math.inf) -> tuple[TrainConfig, float, list[str]]:
    """(config, epochs, reasons): model and dropout for so many seconds of training, but for what somebody set.

    most_parameters: how many the memory can take.
    """
    source, target = (float(side.lengths.sum()) for side in parts(ready, config)[0])
    vocabulary = ready.tokenizer.vocab_size

    def learned(c: TrainConfig) -> float:
        """Target tokens that fit into the time."""
        weights = calibrate.weights(c)
        if c.model == "encdec":  # each of its tokens meets one half of it
            encoder = weights * 3 / 7 * source / target
            operations = 6 * (weights * 4 / 7 + encoder + c.n_embd * vocabulary)
        else:
            operations = 6 * (weights * (1 + source / target) + c.n_embd * vocabulary)
        return seconds / speed.seconds(operations)

    if not {*plan.SHAPE, "n_encoder_layer"} & set(given):
        config = _with_shape(config, SHAPES[0])
        for shape in SHAPES[1:]:
            larger = _with_shape(config, shape)
            weights = calibrate.weights(larger)
            if (learned(larger) >= TOKENS_PER_WEIGHT * weights and weights <= WEIGHTS_PER_TOKEN * target
                    and weights + larger.n_embd * vocabulary <= most_parameters):
                config = larger
    weights, epochs = calibrate.weights(config), learned(config) / target
    if "dropout" not in given:
        config = replace(config, dropout=next(dropout for most, dropout in DROPOUTS if epochs <= most))
    reason = (f"{weights / 1e6:.1f} million weights in the blocks: the pairs can be read about {epochs:.1f} times, "
              f"{epochs * target / weights:.1f} target tokens for each weight; dropout {config.dropout:g}")
    return config, epochs, [reason]


def _with_shape(config: TrainConfig, shape: tuple[int, int, int]) -> TrainConfig:
    """`config` with a shape of SHAPES; a decoder-only model has as many weights in more blocks."""
    layers = shape[0] if config.model == "encdec" else round(shape[0] * 7 / 3)  # 12 and 16 C^2, or 12 C^2 each
    return replace(config, n_layer=layers, n_encoder_layer=None, n_head=shape[1], n_embd=shape[2])


def assemble(run: Path, model: Any, ready: PreparedPairs, config: TrainConfig, dist: Dist,
             record: dict[str, Any], resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the pairs, settings resolved. Arguments: `pretrain`'s."""
    return stages_base.trainer(run, model, lambda c: pair_objective(ready, c, dist, record), config, dist, record,
                               resumed)


def held_out_text(ready: PreparedPairs, config: TrainConfig) -> tuple[int, int]:
    """(characters, bytes) of the targets that are held out."""
    side = parts(ready, config)[1][1]
    text = ready.tokenizer.decode(np.concatenate([side.line(i) for i in range(len(side))]).tolist(), skip_special=True)
    return len(text), len(text.encode())


def said(t: Trainer, ready: PreparedPairs) -> tuple[list[str], float]:
    """What a plan says of the pairs, in lines, and how often the planned steps read them."""
    held = len(parts(ready, t.config)[1][0])
    return [f"pairs: {t.record['text']}, {t.record['documents']:,} to learn from, {held:,} held out",
            f"tokenizer: {ready.reason}"], t.state.steps / t.record["batches"]


def expect(t: Trainer, ready: PreparedPairs) -> None:
    """Nobody knows what loss to expect of a translation."""


def conclude(t: Trainer, ready: PreparedPairs) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: the curve, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, with BLEU and chrF of the held-out pairs; some translations.
    """
    tokens = t.record["val_tokens_of"]
    characters, size = held_out_text(ready, t.config)
    nats = t.record["val_loss"] * tokens
    t.record.update(nats_per_char=nats / characters, bits_per_byte=nats / math.log(2) / size)
    plots.loss_curve(t.run, card.title(t.run, t.record))
    model, words = hf.read_folder(t.run)
    model.to(t.dist.device)
    source, reference = (side[:: -(-len(side) // TRANSLATED)] for side in held_out_lines(ready, t.config))
    made = translate.lines(model, words, source, translate.How(prefix_lm=t.config.prefix_lm))
    score = metrics.translation_score(made, reference, ready.tokenizer.lowercase)
    t.record.update(bleu=round(score.bleu, 2), chrf=round(score.chrf, 2), bleu_signature=score.bleu_signature)
    shown = range(0, len(source), max(1, len(source) // SHOWN))[:SHOWN]
    sample = "\n\n".join(f"{source[i]}\n  -> {made[i]}\n     ({reference[i]})" for i in shown)
    t.record["finished"] = True
    facts = checkpointing.write_run(t)
    card.translation_card(t.run, t.config, facts, sample)
    return facts, sample


def held_out_lines(ready: PreparedPairs, config: TrainConfig) -> tuple[list[str], list[str]]:
    """(sources, references) that are held out, as the tokenizer writes them."""
    sides = parts(ready, config)[1]
    source, target = ([ready.tokenizer.decode(side.line(i).tolist(), skip_special=True) for i in range(len(side))]
                      for side in sides)
    return source, target
