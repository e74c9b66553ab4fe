"""Pretraining as a stage: settings and a text become a `Trainer`, with its steps planned and its blocks compiled.

Other stages start from the same parts: `trainer` makes a run of any batches and any loss, `choose_compile` and
`plan_steps` decide what the clock and the compiler decide. The commands call a stage by the names of this file: `find`,
`prepare`, `new_trainer`, `assemble`, `said`, `expect`, `conclude`; `translation.py` has the same ones.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bardlet import (
    __version__,
    budget,
    checkpoint,
    clock,
    corpus,
    data,
    evaluate,
    hf,
    kept,
    loss,
    memory,
    models,
    optim,
    report,
    survey,
    writing,
)
from bardlet import dist as distributed
from bardlet import train as training
from bardlet.budget import Plan, Speed
from bardlet.config import FLAT, ModelConfig, TrainConfig, option
from bardlet.data import Prepared
from bardlet.dist import Dist
from bardlet.errors import BardletError
from bardlet.models import lora
from bardlet.survey import Survey
from bardlet.tokenizer import Tokenizer
from bardlet.train import Stage, State, Trainer

log = logging.getLogger("bardlet")

SAMPLE_TOKENS = 400
"""Length of the sample that a finished run prints and its model card shows."""


# ---------------------------------------------------------------- the text


def find(config: TrainConfig) -> corpus.Corpus:
    """The text that the settings name."""
    return corpus.find(config.text, config.field)


def prepare(found: corpus.Corpus, config: TrainConfig, words: Tokenizer | None, dist: Dist,
            progress: data.Progress | None = None) -> Prepared:
    """The text as tokens, by `words` or a tokenizer of its own; rank 0 builds them, the others read what it built."""
    with dist.main_first():
        ready = data.prepare(found, words or config.tokenizer, config.vocab_size, progress,
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


def next_token_stage(ready: Prepared, config: TrainConfig, dist: Dist, record: dict[str, Any]) -> Stage:
    """Windows of the text, next-token loss, and the loss on the held-out text as evaluation.

    A held-out text of more than --eval-tokens is looked at in every k-th window; `record` gets `val_tokens`, how many
    tokens an evaluation reads, and `val_tokens_of`, how many there are.
    """
    train_tokens, val_tokens = parts(ready, config)
    windows = data.Windows(train_tokens, config.block_size, config.batch_size * config.grad_accum, config.seed)
    every = -(-len(val_tokens) // config.eval_tokens) if config.eval_tokens else 1
    length = min(256, config.block_size)
    look_at = data.validation_windows(val_tokens, length, every=every)
    record["val_tokens"] = sum(target.numel() for _, target in look_at)
    record["val_tokens_of"] = len(val_tokens) - 1

    def batch(step: int) -> loss.Batch:
        idx, target = windows.batch(step)
        return {"idx": idx, "target": target}

    def validation_loss(model: Any) -> float:
        rows = record.get("evaluation_rows") or evaluate.rows_at_once(model.config, length)
        named = ({"idx": i, "target": t} for i, t in look_at)
        return evaluate.mean_loss(model, named, dist.device, config.dtype, rows)

    return Stage(batch, loss.next_token, loss.count_targets, validation_loss, windows.place)


# ---------------------------------------------------------------- the run


def new_trainer(config: TrainConfig, dist: Dist, out: str | None, given: Collection[str] = (),
                progress: data.Progress | None = None, begun: float | None = None,
                in_file: Collection[str] = (), run: Path | None = None) -> tuple[Trainer, Prepared]:
    """Text, tokenizer, model and optimizers for `config`: a run that has not begun. Nothing is written.

    For a run of --minutes `budget.py` chooses what is neither `given` nor `in_file`, by time, machine and text.

    Args:
        out: the run folder; None: runs/NAME.
        given: the settings that somebody typed: what would do nothing is an error, or a notice.
        in_file: those that somebody's file of settings has.
        begun: when the time of --minutes began (of time.monotonic); None: now.
        run: a folder that is there already, instead of `out`: this run was in it, and begins again.
    """
    begun = time.monotonic() if begun is None else begun
    if out is not None:
        checkpoint.new_folder(Path(out), "")  # before the long part
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
    run = run or checkpoint.new_folder(Path(out) if out else None, f"{found.name}-{config.model}")
    record: dict[str, Any] = {"text": found.name, "text_hash": found.hash, "tokenizer": ready.tokenizer.kind,
                              "documents": ready.documents, "tokens": len(parts(ready, config)[0]),
                              "minutes": config.minutes}
    if plan:
        record.update(reasons=list(plan.reasons), most_steps=plan.most_steps)
    if plan and (own := budget.UNTOLD & by_hand):
        record["untold"] = sorted(own)
    elif seen and seen.counting:
        record["counting"] = list(seen.counting)
    record.update(_facts(found, ready, config, dist))
    t = assemble(run, model, ready, config, dist, record)
    if plan:
        t.state.steps, t.machine["compiled"] = plan.steps, plan.compiled  # until the run has timed its own steps
    return t, ready


def _facts(found: corpus.Corpus, ready: Prepared, config: TrainConfig, dist: Dist) -> dict[str, Any]:
    """What `diagnosis.py` wants to know of a text; some of it is not there when the text is too short."""
    tokens, characters, _ = held_out(ready, config)
    facts: dict[str, Any] = {"duplicated": ready.duplicated, "leaked": ready.leaked,
                             "characters_per_token": round(characters / len(tokens), 4),
                             "guessing": round(math.log(ready.tokenizer.vocab_size), 4)}
    with dist.main_first():
        losses = survey.survey(found, held_out=config.val_part).losses
    return {**facts, "bigram": round(losses[1], 4)} if losses else facts


def _choose(found: corpus.Corpus, config: TrainConfig, given: Collection[str], dist: Dist, begun: float,
            progress: data.Progress | None) -> tuple[Prepared, Survey, Plan]:
    """What `budget.py` chooses for this machine, this text and what is left of the minutes; the text, prepared so."""
    until = begun + 60 * (config.minutes or 0)
    with dist.main_first():
        seen = survey.survey(found, progress, held_out=config.val_part)
    eager = budget.calibrate(dist, config.dtype, config.threads or 1, corpus.cache_folder(), left(until, dist))
    parameters, compiler = memory.most_parameters(dist), config.compile != "off" and not dist.most(
        int(distributed.compiler_missing(dist.device) is not None))

    def room(takes: float) -> tuple[bool, float, Speed]:
        """(whether to compile, if that takes so long; seconds for training; the speed)."""
        seconds = left(until, dist)
        if compiler and (config.compile == "on" or budget.worth_compiling(seconds, takes)):
            return True, clock.usable(max(1.0, seconds - takes)), eager.compiled()
        return False, clock.usable(seconds), eager

    config, reason = budget.choose_vocabulary(config, given, seen, *room(budget.COLD)[1:], parameters)
    ready = prepare(found, config, None, dist, progress)
    if reason:
        ready = replace(ready, reason=reason + data.too_few(ready.tokenizer, config.vocab_size))
    tokens, vocabulary = len(parts(ready, config)[0]), ready.tokenizer.vocab_size
    characters = round(ready.train_chars * tokens / len(ready.train))
    machine = distributed.machine(dist, config.dtype, config.threads or 1)

    def choose(takes: float) -> Plan:
        compiled, seconds, speed = room(takes)
        plan = budget.choose(config, given, tokens, characters, ready.documents, vocabulary, seconds, speed, dist.world,
                             parameters)
        return replace(plan, compiled=compiled)

    plan = choose(budget.WARM)  # if the compiler knows the model of this plan
    if not dist.from_main(int(plan.compiled and kept.read(*_compiled_before(
            plan.config, plan.config.model_config(vocabulary), machine, dist)) is not None)):
        plan = choose(budget.COLD)
    if "eval_tokens" not in given:
        looks = budget.evaluation_tokens(plan.config, vocabulary, left(until, dist), eager)
        plan = replace(plan, config=replace(plan.config, eval_tokens=looks))
    if plan.compiled:
        of_compiler = f"compiled, which takes part of the time and makes steps about {budget.COMPILED:g} times as fast"
        plan = replace(plan, reasons=(*plan.reasons, of_compiler))
    return ready, seen, plan


def left(until: float, dist: Dist) -> float:
    """Seconds until then, by the watch of rank 0; at least 1."""
    return max(1.0, dist.from_main(int(1000 * (until - time.monotonic()))) / 1000)


DECIDED = ("model", "n_layer", "n_encoder_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "tie_embeddings",
           "activation", "tokenizer", "vocab_size")
"""The settings that the weights of --init decide."""


def as_model(config: TrainConfig, shape: ModelConfig, given: Collection[str]) -> TrainConfig:
    """`config` with the shape of the weights that training starts from; its windows may be shorter than theirs."""
    ignored = [option(name) for name in DECIDED if name in given]
    if ignored:
        log.warning("%s: not used, --init %s decides it", ", ".join(ignored), config.init)
    asked = "block_size" in given or config.block_size != TrainConfig.block_size
    block = min(shape.block_size, config.block_size) if asked else shape.block_size
    return replace(config, model=cast(Any, shape.model), n_layer=shape.n_layer, n_head=shape.n_head,
                   n_encoder_layer=shape.n_encoder_layer or None, n_kv_head=shape.n_kv_head, n_embd=shape.n_embd,
                   n_inner=shape.n_inner,
                   block_size=block, tie_embeddings=shape.tie_embeddings)


def settled(config: TrainConfig, dist: Dist) -> TrainConfig:
    """`config` with device, precision and threads as this machine has them; PyTorch is told."""
    _keep_compiled()
    threads = distributed.settle(config.threads, config.deterministic, dist.device)
    device = dist.device.type if config.device == "auto" else config.device
    dtype = distributed.pick_dtype(config.dtype, dist.device)
    return replace(config, dtype=cast(Any, dtype), device=device, threads=threads)


def _keep_compiled() -> None:
    """Have the compiler keep its work in bardlet's cache; torch's own place for it is a temporary folder.

    To be called before the compiler is loaded, which then chooses its folder.
    """
    folder = _compiled_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _compiled_folder() -> Path:
    return corpus.cache_folder() / "compiler"


def assemble(run: Path, model: Any, ready: Prepared, config: TrainConfig, dist: Dist,
             record: dict[str, Any], resumed: bool = False) -> Trainer:
    """A `Trainer` at step 0 that learns the text, settings resolved: device, precision, threads, optimizers, stage.

    Args:
        record: what run.toml says happened, to which more is added.
        resumed: the run goes on; a new one has its micro-batches cut to the size of the memory.
    """
    return trainer(run, model, lambda c: next_token_stage(ready, c, dist, record), config, dist, record, resumed)


def trainer(run: Path, model: Any, stage: Callable[[TrainConfig], Stage], config: TrainConfig, dist: Dist,
            record: dict[str, Any], resumed: bool) -> Trainer:
    """A `Trainer` at step 0 of the stage that `stage` makes of settings. The other arguments are those of `assemble`.

    The stage is made once more where its batches have to be computed in smaller pieces than the settings say.
    """
    config = settled(config, dist)
    if config.batch_size % dist.world and not config.parallel:
        raise BardletError(f"--batch-size {config.batch_size} cannot be shared by {dist.world} processes: "
                           f"take a multiple of {dist.world}")
    model.to(dist.device)
    record["parameters"] = sum(x.numel() for x in model.hf_state_dict().values())
    if config.lora:
        lora.adapt(getattr(model, "policy", model), config.lora)  # a critic, which is new, learns as a whole
        record["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    machine = distributed.machine(dist, config.dtype, config.threads or 1)
    t = Trainer(run, model, optim.build(model, config), stage(config), config, dist, machine, record,
                State(steps=config.steps or 0, replans=list(config.replans[:1])))
    if not resumed:
        memory.fit_micro_batches(t)
        if t.config != config:  # rows are then filled up to another multiple
            t.stage = stage(t.config)
    return t


def said(t: Trainer, ready: Prepared) -> tuple[list[str], float]:
    """What a plan says of the text, in lines, and how often the planned steps read it."""
    return [f"text: {t.record['text']}, {ready.train_chars + ready.val_chars:,} characters in "
            f"{ready.documents:,} document{'s' * (ready.documents != 1)}",
            f"tokenizer: {ready.reason}"], t.state.steps * t.config.tokens_per_step / max(1, t.record["tokens"])


def expect(t: Trainer, ready: Prepared) -> None:
    """Put on record what loss the planned steps should come to (`expected`, nats per character), if that is known."""
    if counting := t.record.get("counting"):
        characters, epochs = learned(t, ready)
        t.record["expected"] = round(budget.expected_loss(counting, characters, epochs), 4)


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
    score = evaluate.score(t.record["val_loss"], len(tokens), characters, size, first)
    t.record.update(bits_per_byte=score.bits_per_byte, nats_per_char=score.nats_per_char,
                    characters=round(learned(t, ready)[0]))
    report.loss_curve(t.run, report.title(t.run, t.record))
    model, words = hf.read_folder(t.run)
    sample = writing.write(model, words, None, documents=ready.documents, tokens=SAMPLE_TOKENS, temperature=0.8,
                           top_k=50, seed=0)
    t.record["finished"] = True
    facts = training.write_run(t)
    report.model_card(t.run, t.config, facts, sample)
    return facts, sample


# ---------------------------------------------------------------- compiled or not, and how many steps


def choose_compile(t: Trainer, seconds: float | None = None) -> None:
    """Resolve --compile: auto compiles where a compiler is found and the run is long enough to win the time back.

    The compiler takes less time where this machine has compiled the same model before.

    Args:
        seconds: how long the run will be; None: measure a few eager steps to find out.
    """
    missing = distributed.compiler_missing(t.dist.device)
    blocks = t.config.model not in FLAT  # a table has nothing to compile
    on = t.config.compile == "on" and blocks
    if on and missing:
        log.warning("--compile on: %s; going on without compilation, which is slower", missing)
        on = False
    if t.config.compile == "auto" and not missing and blocks:
        if seconds is None:
            seconds = clock.seconds_per_step(t, 2) * (t.config.steps or 1)
        before = _compiled_before(t.config, t.model.config, t.machine, t.dist)
        takes = budget.COLD if kept.read(*before) is None else budget.WARM
        gain = budget.COMPILED_PAIRS if t.config.parallel else budget.COMPILED
        on = bool(t.dist.from_main(int(budget.worth_compiling(seconds, takes, gain))))
    if on and (on := _compile(t)) and t.dist.main:
        kept.write(*_compiled_before(t.config, t.model.config, t.machine, t.dist), {})
    t.config = replace(t.config, compile="on" if on else "off")
    t.machine.update(compiled=on, compiler=distributed.compiler(t.dist.device) if on else "")


def _compiled_before(config: TrainConfig, shape: ModelConfig, machine: dict[str, Any],
                     dist: Dist) -> tuple[Path, dict[str, Any]]:
    """(folder, key) under which it is kept that this machine has compiled this model: all that the work depends on.

    The folder lies in the compiler's own: who empties that empties both.
    """
    rows = config.tokens_per_step if config.parallel else config.batch_size // dist.world
    return _compiled_folder() / "models", {
        "bardlet": __version__, "compiler": distributed.compiler(dist.device),
        "machine": {name: machine[name] for name in ("processor", "torch", "dtype", "threads")},
        "model": asdict(shape), "rows": rows, "block_size": config.block_size}


def _compile(t: Trainer) -> bool:
    """Compile the blocks and try them once; where that fails, say so and go on without. Returns whether it worked."""
    log.info("compiling (the first time on a machine takes up to a minute)")
    distributed.compile_blocks(t.model, widths=t.config.varying)
    try:
        clock.seconds_per_step(t, 1)
    except Exception as error:
        distributed.compile_blocks(t.model, on=False)
        what = (str(error).strip().splitlines() or ["no message"])[0][:150]
        log.warning("torch.compile failed here (%s: %s); going on without compilation", type(error).__name__, what)
        return False
    return True


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
    if "most_steps" in t.record:  # the plan of `budget.choose`, made before anything of this run was timed
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
