"""Start a run, resume it, train it to its end.

`start` builds a trainer from settings, plans the steps and trains; `resume` builds it from the newest intact
checkpoint. Both write the model card and the loss curve and mark the run as finished.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bardlet import console, tokenizer
from bardlet.config.finetuning import is_command
from bardlet.config.model import ModelConfig
from bardlet.config.settings import Settings
from bardlet.errors import BardletError
from bardlet.planning import clock, compilation, scaling_law
from bardlet.planning.plan import short_number
from bardlet.run import checkpoint, diagnosis, hf, lock, metrics, trackers
from bardlet.run import folder as run_folder
from bardlet.runtime import atomic, distributed, heartbeat
from bardlet.runtime.signals import Stopped
from bardlet.stages import stage_of
from bardlet.stages.base import Stage
from bardlet.training.checkpointing import restore, write_run
from bardlet.training.state import State, Trainer
from bardlet.training.trainer import fit

log = logging.getLogger("bardlet")

AnyStage = Stage[Any, Any, Any, Any]

# ---------------------------------------------------------------- start and resume


def start(config: Settings, out: str | None = None, started: float | None = None,
          plan_only: bool = False) -> dict[str, Any]:
    """Start a run and train it to its end.

    Args:
        config: the settings; pretraining without steps and minutes takes five minutes.
        out: the run folder to create; None: runs/NAME.
        started: start of the time budget (time.monotonic); None: now.
        plan_only: print the plan and stop.

    Returns:
        The values that `--json` prints; empty on other ranks.
    """
    started = time.monotonic() if started is None else started
    if config.steps is None and config.minutes is None:
        config = replace(config, minutes=config.default_minutes)
    if _started_again(out):
        return resume(Path(str(out)), reward=getattr(config, "reward", None))
    with distributed.connect(config.device) as dist:
        console.show_notices(dist.main)
        with console.preparation_progress(dist.main) as progress:
            stage = stage_of(config)(config, dist, progress)
            trainer = stage.begin(out, started)
        estimated = plan_only and trainer.record.reasons is not None  # from the calibration, without timing this model
        if config.minutes is None:
            compilation.choose_compile(trainer)
        elif not estimated:
            stage.plan_steps(trainer, config.minutes * 60, started)
        stage.predict(trainer)
        for finding in diagnosis.of_text(trainer.record.mapping()):
            log.warning(finding.message)
        plan = _say_plan(trainer, stage) if dist.main else {}
        return plan if plan_only else run_to_end(trainer, stage, resumed_from=None, started=started)


def resume(run: Path, reward: str | None = None, steps: int | None = None,
           allow_change: bool = False) -> dict[str, Any]:
    """Continue a run exactly where it stopped, and train it to its end.

    Args:
        run: the run folder.
        reward: the run's reward command; bardlet never runs a command that only a file names.
        steps: a new total number of steps, which is a change.
        allow_change: continue even if machine, precision, compiler, text or number of steps changed.

    Returns:
        The values that `--json` prints; empty on other ranks.
    """
    if steps is not None and not allow_change:
        raise BardletError(f"--steps {steps} changes the schedule of the run; add --allow-change")
    console.show_notices(console.main_rank())
    config, record = run_folder.settings(run, allow_change)
    _same_reward(run, config, reward)
    started = time.monotonic()
    with distributed.connect(config.device) as dist, lock.locked(run) if dist.main else nullcontext():
        if dist.main:
            run_folder.remove_partial(run)
        with console.preparation_progress(dist.main) as progress:
            stage = stage_of(config)(config, dist, progress)
            build = restore_run if checkpoint.steps_saved(run) or record.get("saved") else restart_from_zero
            trainer = build(run, stage, record, allow_change)
        if steps is not None:
            _change_steps(trainer, steps)
        step = trainer.state.step
        if step >= trainer.state.steps and trainer.record.finished:
            raise BardletError(f"{run}: finished, all {step:,} steps are done; train longer with --steps N "
                               "--allow-change, or start a new run with "
                               f"`bardlet train --init {shlex.quote(str(run))}`")
        if dist.main:
            console.say(f"continuing after step {step:,} of {trainer.state.steps:,}" if step
                        else "no checkpoint yet; starting over")
        return run_to_end(trainer, stage, resumed_from=step, started=started)


def _started_again(out: str | None) -> bool:
    """Return True if torchrun restarts this command (--max-restarts) and its run exists."""
    if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise BardletError("--max-restarts: restarted processes must find their run; name it with --out")
    if heartbeat.attempt() == "0" or out is None or not (Path(out) / "run.toml").exists():
        return False
    return run_folder.settings(Path(out))[1].get("launch") == heartbeat.launch()


def restart_from_zero(run: Path, stage: AnyStage, record: dict[str, Any], allow_change: bool) -> Trainer:
    """Build the trainer of a run that has no checkpoint yet, with its settings and plan."""
    config = stage.config
    trainer = stage.begin(None, time.monotonic(), run)
    _same_text(run, record, stage, allow_change)
    for name in ("base_hash", "reward_hash"):
        if record.get(name) not in (None, getattr(trainer.record, name, None)):
            changed = config.init if name == "base_hash" else getattr(config, "reward", None)
            raise BardletError(f"{run}: {changed} changed since the run started; restore it")
    trainer.record.minutes = None  # the clock continues
    trainer.record.fill(record)
    compilation.choose_compile(trainer)
    return trainer


def restore_run(run: Path, stage: AnyStage, record: dict[str, Any], allow_change: bool) -> Trainer:
    """Build the trainer of a run from its newest intact checkpoint."""
    config, dist = stage.config.resolved(), stage.dist  # run.toml omits settings that a rung lacks
    stage.config = config
    if "text_hash" not in record:
        raise BardletError(f"{run / 'run.toml'}: no [record] of its text, so the run cannot continue; "
                           f"restore a copy, or start a new run with `bardlet train --init {shlex.quote(str(run))}`")
    folder = checkpoint.newest_intact(run)
    run_folder.verify_root(run, folder)
    known = tokenizer.load(run)
    try:
        stage.source = stage.load_data()
    except BardletError as error:
        raise BardletError(f"{run}: its text cannot be read ({error}); relative paths start at the folder where the "
                           "run was started: resume from there") from None
    _same_text(run, record, stage, allow_change)
    stage.data = stage.tokenize(known)
    shape = replace(hf.read_model_config(run), dropout=config.dropout)
    model = hf.build(shape, hf.read_tensors(folder / "model.safetensors"), run)
    stage.record = stage.record_class.of(record)
    trainer = stage.build_trainer(run, model, resumed=True)
    if config.compile == "on":
        compilation.choose_compile(trainer)
    before = checkpoint.read_metadata(folder)["machine"]
    different = [name for name, value in trainer.machine.items() if before.get(name) != value]
    if different and not allow_change:
        name = different[0]
        raise BardletError(f"{run}: {name} was {before.get(name)}, is {trainer.machine[name]} here, so the run "
                           "would not continue bit for bit; continue anyway with --allow-change")
    if lost := bool(dist.broadcast_int(int(dist.main and run_folder.repair_root(run)))):
        trainer.record.update(finished=None, selected_by=None, selected_step=None, val_loss=None, averaged=None)
    restore(trainer, folder, best_is_lost=lost)
    return trainer


def _same_text(run: Path, record: dict[str, Any], stage: AnyStage, allow_change: bool) -> None:
    """Raise BardletError if the text changed since the run started, unless `allow_change`."""
    if stage.source.hash != record.get("text_hash") and not allow_change:
        raise BardletError(f"{run}: the text {stage.source.name} changed since the run started; "
                           "restore it, or continue with --allow-change")


def _same_reward(run: Path, config: Settings, reward: str | None) -> None:
    """Raise BardletError if the run needs its reward command again, or if another reward is given."""
    known: str | None = getattr(config, "reward", None)
    missing = is_command(known) and reward is None
    if missing or reward not in (None, known):
        if known is None:
            raise BardletError(f"--reward: `bardlet {config.command}` has no rewards; drop it")
        command = f"bardlet resume {shlex.quote(str(run))} --reward {shlex.quote(known)}"
        raise BardletError(f"{run}: its rewards come from `{known}`; " + (
            f"if that is a command, run `{command}` (bardlet never runs a command that only a file names); if it is a "
            "reward model, its folder is missing: restore it" if missing else
            f"--reward {reward} would change the run; drop it"))


def _change_steps(trainer: Trainer, steps: int) -> None:
    """Set a new total number of steps, which the clock no longer changes."""
    before = [event for event in trainer.state.replans if event[0] < trainer.state.step] or [(0, trainer.state.steps)]
    trainer.state.steps, trainer.state.replans = steps, [*before, (trainer.state.step, steps)]
    trainer.config = replace(trainer.config, replans=tuple(trainer.state.replans))
    # reasons, limit and prediction belong to the old plan
    trainer.record.update(minutes=None, finished=False, reasons=None, most_steps=None, expected=None)


# ---------------------------------------------------------------- the plan in words


def _end(trainer: Trainer, steps: int) -> str:
    """Return the end of the plan line: the time budget, and why a run will not use all of it."""
    if not trainer.record.minutes:
        return ""
    minutes = _minutes(trainer.record.minutes)
    if steps + 1 >= (trainer.record.most_steps or math.inf):  # the estimate is rounded, the maximum rounded up
        return f", ends before {minutes} are over: more steps would only memorize the text"
    return f", ends within {minutes}"


def _say_plan(trainer: Trainer, stage: AnyStage) -> dict[str, Any]:
    """Print data, model and plan, and return what --json prints of the plan."""
    c, tokens, model = trainer.config, trainer.config.tokens_per_step, trainer.model.config
    lines, epochs = stage.describe(trainer)
    steps = c.replans[-1][1] if c.replans else trainer.state.steps  # a repeated run knows the clock's last decision
    for line in lines:
        console.say(line)
    console.say(f"model: {model.model}, {_shape(model)}, context {c.block_size}, "
                f"{trainer.record.parameters:,} parameters"
                + (f"; LoRA of rank {c.lora}: {trainer.record.trainable:,} trainable" if c.lora else ""))
    for reason in trainer.record.reasons or []:
        console.say(f"  {reason}")
    optimizer = "muon" if len(trainer.optimizers) > 1 else "adamw"  # the bigram table has no matrices for Muon
    size = f"{'' if stage.material == 'text' else 'up to '}{tokens:,} tokens"
    console.say(f"plan: {console.count(steps, 'step')} of {size} "
                f"({_epochs(epochs * steps / trainer.state.steps)} of the {stage.material}), {optimizer}, "
                f"{c.dtype}{', compiled' if trainer.machine['compiled'] else ''}, "
                f"{console.count(trainer.machine['threads'], 'thread')}"
                + _end(trainer, steps))
    if expected := stage.prediction():
        console.say(f"expected validation loss: {expected}")
    return {"steps": steps, "tokens_per_step": tokens, "parameters": trainer.record.parameters, "model": model.model,
            "tokenizer": stage.data.tokenizer.kind, "compiled": trainer.machine["compiled"],
            "expected": trainer.record.expected, "reasons": trainer.record.reasons or []}


def _epochs(epochs: float) -> str:
    number = short_number(epochs)
    return f"{number} epoch" + "s" * (number != "1")


def _minutes(minutes: float) -> str:
    return "a minute" if minutes == 1 else f"{minutes:g} minutes"


def _shape(model: ModelConfig) -> str:
    """Return the shape of a model in words. A rung of the ladder counts 1 of each part it lacks."""
    if model.model == "bigram":
        return "a table"
    counts = ((model.n_layer, "layer"), (model.n_head, "head"), (model.n_embd, "channel"))
    encoder = f"{model.n_encoder_layer} and " if model.n_encoder_layer else ""
    return encoder + ", ".join(console.count(number, noun) for number, noun in counts)


# ---------------------------------------------------------------- to the end


def run_to_end(trainer: Trainer, stage: AnyStage, resumed_from: int | None, started: float) -> dict[str, Any]:
    """Train, write the model card and the curve, and print where they are. Return what --json prints.

    started: start of this command (time.monotonic); the preparation counts as time of the run.
    """
    config = trainer.config
    if config.eval_every is None:
        config = replace(config, eval_every=_eval_every(trainer))
    if config.save_every is None:
        config = replace(config, save_every=max(1, trainer.state.steps // 10))
    trainer.config = config
    if not trainer.dist.main:
        _fit(trainer, stage, started)
        return {}
    if resumed_from is None:
        trainer.run.mkdir(parents=True, exist_ok=True)
        atomic.sync_folder(trainer.run.parent)
    # a resumed run is locked already, since before its checkpoint was read
    with lock.locked(trainer.run) if resumed_from is None else nullcontext():
        if resumed_from is None:
            run_folder.new_folder(trainer.run, "", locked=True)  # another process may have created it meanwhile
            run_folder.remove_partial(trainer.run)
            if trainer.dist.world > 1:
                trainer.record.launch = heartbeat.launch()
        try:
            _fit(trainer, stage, started)
            return _summary(trainer, stage, resumed_from)
        except BaseException as error:
            # nothing was saved yet: the folder is useless
            if resumed_from is None and trainer.record.saved is None and not checkpoint.steps_saved(trainer.run):
                shutil.rmtree(trainer.run, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                raise Stopped(trainer.run, trainer.state.step, getattr(error, "number", signal.SIGINT)) from None
            raise


def _eval_every(trainer: Trainer) -> int:
    """Return the steps between evaluations: about 20 evaluations, fewer if they would take longer than the training.

    Evaluating a token takes about a third of training on it.
    """
    train_tokens, val_tokens = trainer.state.steps * trainer.config.tokens_per_step, trainer.record.val_tokens
    number = clock.evaluations_for(3 * train_tokens, val_tokens, share=1) if val_tokens else clock.EVALUATIONS
    return -(-trainer.state.steps // number)


def _fit(trainer: Trainer, stage: AnyStage, started: float) -> None:
    def no_clock(state: State) -> None:
        return None

    minutes = trainer.record.minutes
    replan = clock.replanner(60 * minutes, trainer.record.most_steps) if minutes else no_clock
    if not trainer.dist.main:
        _seconds_spent(trainer.state, started)
        fit(trainer, replan)
        return
    write_run(trainer)
    if trainer.state.step == 0:
        for name in ("metrics.jsonl", "model.safetensors"):  # left by a process that ended before its first checkpoint
            (trainer.run / name).unlink(missing_ok=True)
        hf.write_folder(trainer.run, trainer.model, stage.data.tokenizer)
    active_trackers = trackers.trackers(trainer.config, trainer.run)
    reported: set[str] = set()
    with console.training_progress(stage.unit) as watch:

        def on_step(line: dict[str, Any]) -> None:
            watch(line)
            if line["step"] % max(1, trainer.state.steps // diagnosis.CHECKS) == 0 or line["step"] == line["steps"]:
                _diagnose(trainer, stage, reported)
            if active_trackers and line["step"] % trainer.config.log_every == 0:
                values = {name: line[name] for name in ("train_loss", "val_loss", "lr") if line[name] is not None}
                for tracker in active_trackers:
                    tracker(line["step"], values)

        _seconds_spent(trainer.state, started)
        try:
            fit(trainer, replan, on_step)
        except BardletError:  # the diagnosis may give the reason
            _diagnose(trainer, stage, reported)
            raise


def _seconds_spent(state: State, started: float) -> None:
    """Count the time since `started`, when no step ran, as time of the run."""
    spent = time.monotonic() - started
    state.elapsed += spent
    state.prepared += spent


def _diagnose(trainer: Trainer, stage: AnyStage, reported: set[str]) -> None:
    """Log the findings about the losses, each once. Losses of reinforcement learning show nothing."""
    if not stage.loss_is_telling:
        return
    lines, record = metrics.read_metrics(trainer.run), trainer.record.mapping()
    for finding in diagnosis.of_losses(lines, trainer.config, trainer.state.steps, record):
        if finding.about not in reported:
            reported.add(finding.about)
            log.warning(finding.message)


def _summary(trainer: Trainer, stage: AnyStage, resumed_from: int | None) -> dict[str, Any]:
    facts, sample = stage.finish(trainer)
    console.say(f"\n{sample}\n")
    mean = f", mean of the last {facts['averaged']:,} steps" if facts.get("averaged") else ""
    console.say(f"{stage.validation_label} {stage.describe_loss()} ({facts['selected_by']} weights, "
                f"step {facts['selected_step']:,}{mean}); {console.count(facts['steps'], 'step')} in "
                f"{console.clock_time(facts['seconds'])}")
    if expected := facts.get("expected"):
        loss, outside = facts["nats_per_char"], abs(facts["nats_per_char"] / expected - 1) > scaling_law.PREDICTION_BAND
        console.say(f"expected: {scaling_law.describe(expected)}; got {loss:.4f}"
                    + (", outside the predicted range" if outside else ""))
    for line in stage.results():
        console.say(line)
    use = f"; try `bardlet {stage.use} {shlex.quote(str(trainer.run))}`" if stage.use else ""
    console.say(f"saved to {trainer.run}{use}; loss curve: {trainer.run / 'loss.png'}")
    return {"run": str(trainer.run), "steps": trainer.state.step, "resumed_from": resumed_from,
            "seconds": round(trainer.state.seconds, 3), "train_loss": facts.get("train_loss"),
            "val_loss": facts["val_loss"], "nats_per_char": facts.get("nats_per_char"),
            "expected": facts.get("expected"), "selected_by": facts["selected_by"],
            "tokens_per_second": facts["tokens_per_second"], "parameters": facts["parameters"],
            **stage.record.for_json()}
