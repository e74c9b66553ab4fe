"""Pretraining as a stage: settings and a text become a `Trainer`, with its steps planned and its blocks compiled.

Other stages start from the same parts: `trainer` (stages/base.py) makes a run of any batches and any loss,
`choose_compile` (planning/compilation.py) and `plan_steps` decide what the clock and the compiler decide. The
runner calls a stage by the names of this file: `find`, `prepare`, `new_trainer`, `assemble`, `said`, `expect`,
`conclude`; `stages/translation.py` has the same ones.
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
from bardlet.data import corpus, shards, statistics
from bardlet.data import windows as data_windows
from bardlet.data.shards import Prepared
from bardlet.data.statistics import Survey
from bardlet.errors import BardletError
from bardlet.evaluation import metrics
from bardlet.inference import text_generation
from bardlet.planning import calibrate, clock, memory, scaling_law
from bardlet.planning import plan as budget
from bardlet.planning.calibrate import Speed
from bardlet.planning.clock import left
from bardlet.planning.compilation import _compiled_before, choose_compile
from bardlet.planning.plan import Plan
from bardlet.run import card, folder, hf, plots
from bardlet.runtime import cache, distributed
from bardlet.runtime import compiler as runtime_compiler
from bardlet.runtime.distributed import Dist
from bardlet.stages.base import DECIDED, as_model, settled, trainer
from bardlet.tokenizer import Tokenizer
from bardlet.training import checkpointing, losses, optim
from bardlet.training import trainer as training
from bardlet.training.state import Objective, Trainer

log = logging.getLogger("bardlet")

SAMPLE_TOKENS = 400
"""Length of the sample that a finished run prints and its model card shows."""


# ---------------------------------------------------------------- the text


def find(config: TrainConfig) -> corpus.Corpus:
    """The text that the settings name."""
    return corpus.find(config.text, config.field)


def prepare(found: corpus.Corpus, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: shards.Progress | None = None) -> Prepared:
    """The text as tokens, by `words` or a tokenizer of its own; rank 0 builds them, the others read what it built."""
    with dist.main_first():
        ready = shards.prepare(found, words or config.tokenizer, config.vocab_size, progress,
                             skip_unseen=words is not None)
    if ready.skipped:
        log.warning("%s: %d characters that the tokenizer has never seen were left out", found.name, ready.skipped)
    return ready


def parts(ready: Prepared, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) tokens. The development split is the last tenth of the training part."""
    if config.val_part == "val":
        return ready.train, ready.val
    cut = int(0.9 * len(ready.train))
    return ready.train[:cut], ready.train[cut:]


def held_out(ready: Prepared, config: TrainConfig) -> tuple[np.ndarray, int, int]:
    """(tokens, characters, bytes) of what this run does not learn from."""
    tokens = parts(ready, config)[1]
    if config.val_part == "val":
        return tokens, ready.val_chars, ready.val_bytes
    text = ready.tokenizer.decode(tokens.tolist(), skip_special=True)
    return tokens, len(text), len(text.encode())


def next_token_objective(ready: Prepared, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Objective:
    """Windows of the text, next-token loss, and the loss on the held-out text as evaluation.

    A held-out text of more than --eval-tokens is looked at in every k-th window; `record` gets `val_tokens`, how many
    tokens an evaluation reads, and `val_tokens_of`, how many there are.
    """
    train_tokens, val_tokens = parts(ready, config)
    windows = data_windows.Windows(train_tokens, config.block_size, config.batch_size * config.grad_accum, config.seed)
    every = -(-len(val_tokens) // config.eval_tokens) if config.eval_tokens else 1
    length = min(256, config.block_size)
    look_at = data_windows.validation_windows(val_tokens, length, every=every)
    record["val_tokens"] = sum(target.numel() for _, target in look_at)
    record["val_tokens_of"] = len(val_tokens) - 1

    def batch(step: int) -> data_batch.Batch:
        idx, target = windows.batch(step)
        return {"idx": idx, "target": target}

    def validation_loss(model: Any) -> float:
        rows = record.get("evaluation_rows") or metrics.rows_at_once(model.config, length)
        named = ({"idx": i, "target": t} for i, t in look_at)
        return metrics.mean_loss(model, named, dist.device, config.dtype, rows)

    return Objective(batch, losses.next_token, losses.count_targets, validation_loss, windows.place)


# ---------------------------------------------------------------- the run


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: shards.Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, Prepared]:
    """Text, tokenizer, model and optimizers for `config`: a run that has not begun. Nothing is written.

    For a run of --minutes `planning/plan.py` chooses what is neither `given` nor `in_file`, by time, machine and text.

    Args:
        out: the run folder; None: runs/NAME.
        given: the settings that somebody typed: what would do nothing is an error, or a notice.
        in_file: those that somebody's file of settings has.
        begun: when the time of --minutes began (of time.monotonic); None: now.
        run: a folder that is there already, instead of `out`: this run was in it, and begins again.
    """
    begun = time.monotonic() if begun is None else begun
    if out is not None:
        folder.new_folder(Path(out), "")  # before the long part
    base = hf.read_folder(Path(config.init), config.dropout) if config.init else None
    if "encdec" in (config.model, base and base[0].config.model):
        raise BardletError("an encoder-decoder translates: name its pairs, with --source F --target F or --pair de-en")
    if not base and (unused := config.unused(given)):
        log.warning("%s: not used, %s does not have that", ", ".join(unused), config.model)
    config = settled(config, dist)
    found = find(config)
    plan = seen = None
    by_hand = {*given, *in_file} - ({"tokenizer"} if config.tokenizer == "auto" else set())
    if config.minutes is not None and base is None and config.model in budget.MODELS:
        ready, seen, plan = _choose(found, config, by_hand, dist, begun, progress)
        config = plan.config
    else:
        ready = prepare(found, config, base[1] if base else None, dist, progress)
    torch.manual_seed(config.seed)
    if base:
        model = base[0]
        config = as_model(config, model.config, given)
        config.unused(set(given) - set(DECIDED))
    else:
        shape = config.model_config(ready.tokenizer.vocab_size)
        memory.check_weights(shape, dist)
        model = models.build(shape)
    config = replace(config, text=config.text or (found.name,))
    run = run or folder.new_folder(Path(out) if out else None, f"{found.name}-{config.model}")
    record: dict[str, Any] = {"text": found.name, "text_hash": found.hash, "tokenizer": ready.tokenizer.kind,
                              "documents": ready.documents, "tokens": len(parts(ready, config)[0]),
                              "minutes": config.minutes}
    if plan:
        record.update(reasons=list(plan.reasons), most_steps=plan.most_steps)
    if plan and (own := scaling_law.UNTOLD & by_hand):
        record["untold"] = sorted(own)
    elif seen and seen.counting:
        record["counting"] = list(seen.counting)
    record.update(_facts(found, ready, config, dist))
    t = assemble(run, model, ready, config, dist, record)
    if plan:
        t.state.steps, t.machine["compiled"] = plan.steps, plan.compiled  # until the run has timed its own steps
    return t, ready


def _facts(found: corpus.Corpus, ready: Prepared, config: TrainConfig, dist: Dist) -> dict[str, Any]:
    """What `run/diagnosis.py` wants to know of a text; some of it is not there when the text is too short."""
    tokens, characters, _ = held_out(ready, config)
    facts: dict[str, Any] = {"duplicated": ready.duplicated, "leaked": ready.leaked,
                             "characters_per_token": round(characters / len(tokens), 4),
                             "guessing": round(math.log(ready.tokenizer.vocab_size), 4)}
    with dist.main_first():
        losses = statistics.survey(found, held_out=config.val_part).losses
    return {**facts, "bigram": round(losses[1], 4)} if losses else facts


def _choose(found: corpus.Corpus, config: TrainConfig, given: Collection[str], dist: Dist, begun: float,
            progress: shards.Progress | None) -> tuple[Prepared, Survey, Plan]:
    """What `planning/plan.py` chooses for this machine, this text and the minutes left; the text, prepared so."""
    until = begun + 60 * (config.minutes or 0)
    with dist.main_first():
        seen = statistics.survey(found, progress, held_out=config.val_part)
    eager = calibrate.calibrate(dist, config.dtype, config.threads or 1, corpus.cache_folder(), left(until, dist))
    parameters, compiler = memory.most_parameters(dist), config.compile != "off" and not dist.most(
        int(runtime_compiler.compiler_missing(dist.device) is not None))

    def room(takes: float) -> tuple[bool, float, Speed]:
        """(whether to compile, if that takes so long; seconds for training; the speed)."""
        seconds = left(until, dist)
        if compiler and (config.compile == "on" or calibrate.worth_compiling(seconds, takes)):
            return True, clock.usable(max(1.0, seconds - takes)), eager.compiled()
        return False, clock.usable(seconds), eager

    config, reason = budget.choose_vocabulary(config, given, seen, *room(calibrate.COLD)[1:], parameters)
    ready = prepare(found, config, None, dist, progress)
    if reason:
        ready = replace(ready, reason=reason + shards.too_few(ready.tokenizer, config.vocab_size))
    tokens, vocabulary = len(parts(ready, config)[0]), ready.tokenizer.vocab_size
    characters = round(ready.train_chars * tokens / len(ready.train))
    machine = distributed.machine(dist, config.dtype, config.threads or 1)

    def choose(takes: float) -> Plan:
        compiled, seconds, speed = room(takes)
        plan = budget.choose(config, given, tokens, characters, ready.documents, vocabulary, seconds, speed, dist.world,
                             parameters)
        return replace(plan, compiled=compiled)

    plan = choose(calibrate.WARM)  # if the compiler knows the model of this plan
    if not dist.from_main(int(plan.compiled and cache.read(*_compiled_before(
            plan.config, plan.config.model_config(vocabulary), machine, dist)) is not None)):
        plan = choose(calibrate.COLD)
    if "eval_tokens" not in given:
        looks = budget.evaluation_tokens(plan.config, vocabulary, left(until, dist), eager)
        plan = replace(plan, config=replace(plan.config, eval_tokens=looks))
    if plan.compiled:
        of_compiler = ("compiled, which takes part of the time and makes steps about "
                       f"{calibrate.COMPILED:g} times as fast")
        plan = replace(plan, reasons=(*plan.reasons, of_compiler))
    return ready, seen, plan


def assemble(run: Path, model: Any, ready: Prepared, config: TrainConfig, dist: Dist,
             record: dict[str, Any], resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the text, settings resolved: device, precision, threads, optimizers, stage.

    Args:
        record: what run.toml says happened, to which more is added.
        resumed: the run goes on; a new one has its micro-batches cut to the size of the memory.
    """
    return trainer(run, model, lambda c: next_token_objective(ready, c, dist, record), config, dist, record, resumed)


def said(t: Trainer, ready: Prepared) -> tuple[list[str], float]:
    """What a plan says of the text, in lines, and how often the planned steps read it."""
    return [f"text: {t.record['text']}, {ready.train_chars + ready.val_chars:,} characters in "
            f"{ready.documents:,} document{'s' * (ready.documents != 1)}",
            f"tokenizer: {ready.reason}"], t.state.steps * t.config.tokens_per_step / max(1, t.record["tokens"])


def expect(t: Trainer, ready: Prepared) -> None:
    """Put on record what loss the planned steps should come to (`expected`, nats per character), if that is known."""
    if counting := t.record.get("counting"):
        characters, epochs = learned(t, ready)
        t.record["expected"] = round(scaling_law.expected_loss(counting, characters, epochs), 4)


def learned(t: Trainer, ready: Prepared) -> tuple[float, float]:
    """(characters, epochs) that the planned steps learn from: how many, and how often the text."""
    tokens = t.state.steps * t.config.tokens_per_step
    return tokens * ready.train_chars / len(ready.train), tokens / t.record["tokens"]


def conclude(t: Trainer, ready: Prepared) -> tuple[dict[str, Any], str]:
    """What a finished run leaves besides its weights: the curve, the model card, the mark that it is finished.

    Returns:
        (record, sample): what run.toml says happened, and a text by the weights at the root.
    """
    tokens, characters, size = held_out(ready, t.config)
    first = ready.tokenizer.decode([int(tokens[0])], skip_special=True)
    score = metrics.score(t.record["val_loss"], len(tokens), characters, size, first)
    t.record.update(bits_per_byte=score.bits_per_byte, nats_per_char=score.nats_per_char,
                    characters=round(learned(t, ready)[0]))
    plots.loss_curve(t.run, card.title(t.run, t.record))
    model, words = hf.read_folder(t.run)
    sample = text_generation.write(model, words, None, documents=ready.documents, tokens=SAMPLE_TOKENS, temperature=0.8,
                           top_k=50, seed=0)
    t.record["finished"] = True
    facts = checkpointing.write_run(t)
    card.model_card(t.run, t.config, facts, sample)
    return facts, sample


# ---------------------------------------------------------------- compiled or not, and how many steps


def plan_steps(t: Trainer, seconds: float, begun: float, given: Collection[str] = ()) -> None:
    """Decide the number of steps and whether to compile, from a few timed steps; and the weight decay for so many.

    Args:
        seconds: the time of the whole run, which began at `begun` (of time.monotonic).
        given: the names of the settings that somebody set.
    """
    choose_compile(t, seconds - (time.monotonic() - begun))
    per_step = clock.seconds_per_step(t)
    began = time.monotonic()
    training.evaluate(t)
    per_evaluation = time.monotonic() - began
    left = max(0.0, seconds - (time.monotonic() - begun))
    evaluations = clock.evaluations_for(left, per_evaluation)
    steps = t.dist.from_main(clock.steps_for(left, per_step, evaluations * per_evaluation))
    steps = min(steps, t.record.get("most_steps") or steps)
    t.state.steps, t.state.replans = steps, [(0, steps)]
    if steps < 20:
        log.warning("%d steps are few: this machine is busy or slow (%.1f s a step); give it more --minutes, or a "
                    "smaller model (--n-layer, --n-embd)", steps, per_step)
    if t.config.eval_every is None:
        t.config = replace(t.config, eval_every=t.dist.from_main(-(-steps // evaluations)))
    if "most_steps" in t.record:  # the plan of `plan.choose`, made before anything of this run was timed
        _regularise(t, given)


def _regularise(t: Trainer, given: Collection[str]) -> None:
    """Have weight decay, and what is said of it, fit the steps that were timed; dropout stays, it costs time itself."""
    tokens, learned = t.record["tokens"], float(t.state.steps * t.config.tokens_per_step)
    decay, _ = budget.regularisation(budget.heart(t.config, learned / tokens, tokens))
    if "weight_decay" not in given and decay != t.config.weight_decay:
        t.config = replace(t.config, weight_decay=decay)
        t.optimizers = optim.build(t.model, t.config)
    enough = t.state.steps == t.record["most_steps"]
    t.record["reasons"][:2] = budget.reasons(t.config, tokens, learned, enough)
