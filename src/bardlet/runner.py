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
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bardlet import console, tokenizer
from bardlet.config.finetuning import RolloutConfig, is_command
from bardlet.config.paths import given_reward
from bardlet.config.pretraining import TrainConfig
from bardlet.config.settings import Settings
from bardlet.errors import BardletError, quoted
from bardlet.inference.generate import eval_mode
from bardlet.planning import clock, compilation
from bardlet.run import checkpoint, diagnosis, hf, hub, lock, metrics, rollout_diagnosis, samples, trackers
from bardlet.run import folder as run_folder
from bardlet.runtime import atomic, contention, distributed, heartbeat, parallelize
from bardlet.runtime.compiler import eager
from bardlet.runtime.signals import Stopped
from bardlet.stages import stage_of, summary
from bardlet.stages.base import AnyStage
from bardlet.training.checkpointing import restore, write_run
from bardlet.training.state import State, Trainer
from bardlet.training.trainer import fit

log = logging.getLogger("bardlet")


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
    with distributed.connect(config.device, config.elastic) as dist:
        console.show_notices(dist.main)
        with console.preparation_progress(dist.main) as progress:
            with dist.main_first():
                config = hub.pinned(config)
            stage = stage_of(config)(config, dist, progress)
            trainer = stage.begin(out, started)
            trainer.record.base_revision = hub.revision(config.init)
        if config.minutes is not None and (factor := clock.slowdown(dist)) > 1:
            log.warning("this machine is busy: %s; close them, or give more --minutes", contention.describe(factor))
        estimated = plan_only and trainer.state.steps > 0  # from the calibration, without timing this model
        if config.minutes is None:
            compilation.choose_compile(trainer, compiling=not plan_only)
        elif not estimated:
            stage.plan_steps(trainer, config.minutes * 60, started, compiling=not plan_only)
        stage.predict(trainer)
        for finding in diagnosis.of_text(trainer.record.mapping()):
            log.warning(finding.message)
        plan = summary.say_plan(trainer, stage) if dist.main else {}
        if plan_only:
            return plan
        if stage.taken:
            log.info("%s exists; the new run is %s", stage.taken, trainer.run)
        return run_to_end(trainer, stage, resumed_from=None, started=started)


def resume(run: Path, reward: str | None = None, steps: int | None = None, allow_change: bool = False,
           minutes: float | None = None) -> dict[str, Any]:
    """Continue a run exactly where it stopped, and train it to its end.

    Args:
        run: the run folder.
        reward: the run's reward command; bardlet never runs a command that only a file names.
        steps: a new total number of steps, which is a change.
        allow_change: continue even if machine, precision, compiler, text or number of steps changed.
        minutes: how much longer to train, in place of steps: as many as fit at the pace so far.

    Returns:
        The values that `--json` prints; empty on other ranks.
    """
    console.show_notices(console.main_rank())
    reward = reward and given_reward(reward)
    config, record = run_folder.settings(run, allow_change)
    if minutes is not None:
        if steps is not None:
            raise BardletError("--minutes and --steps: both set the end of the run; drop one")
        steps = _steps_after(run, minutes, allow_change)
    elif steps is not None:
        _check_steps(run, steps, allow_change)
    _same_reward(run, config, reward)
    started = time.monotonic()
    with distributed.connect(config.device, config.elastic) as dist, lock.locked(run) if dist.main else nullcontext():
        if dist.main:
            run_folder.remove_partial(run)
        with console.preparation_progress(dist.main) as progress:
            stage = stage_of(config)(config, dist, progress)
            if checkpoint.steps_saved(run) or record.get("saved"):
                trainer = restore_run(run, stage, record, allow_change, longer=steps is not None)
            else:
                trainer = restart_from_zero(run, stage, record, allow_change)
        if steps is not None:
            _change_steps(trainer, steps)
        step = trainer.state.step
        if dist.main:
            about = "about " * bool(trainer.record.minutes)
            console.say(f"continuing after step {step:,} of {about}{trainer.state.steps:,}" if step
                        else "no checkpoint yet; starting over")
        return run_to_end(trainer, stage, resumed_from=step, started=started)


def _started_again(out: str | None) -> bool:
    """Return True if a launcher starts this command again (--max-restarts, a Slurm job) and its run exists."""
    if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise BardletError("--max-restarts: restarted processes must find their run; name it with --out")
    if not heartbeat.restarted() or out is None or not (Path(out) / "run.toml").exists():
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


def restore_run(run: Path, stage: AnyStage, record: dict[str, Any], allow_change: bool, longer: bool) -> Trainer:
    """Build the trainer of a run from its newest intact checkpoint. longer: the run gets more steps, so it may be
    finished."""
    config, dist = stage.config.resolved(), stage.dist  # run.toml omits settings that a rung lacks
    stage.config = config
    if "text_hash" not in record:
        raise BardletError(f"{run / 'run.toml'}: no [record] of its text, so the run cannot continue; "
                           f"restore a copy, or start a new run with `bardlet train --init {quoted(run)}`")
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
    if checkpoint.shares_in(folder):
        model = stage.new_model_of(shape)
    else:
        model = hf.build(shape, hf.read_tensors(folder / "model.safetensors"), run)
    stage.record = stage.record_class.of(record)
    trainer = stage.build_trainer(run, model, resumed=True)
    metadata = checkpoint.read_metadata(folder)
    done, before = metadata["step"], metadata["machine"]
    finished = bool(record.get("finished")) and done >= metadata["steps"] and not longer
    if dist.broadcast_int(int(finished and dist.main and run_folder.root_is_intact(run))):  # else there is a repair
        raise _finished(run, done)
    if config.compile == "on":
        compilation.choose_compile(trainer)
    free = {"processes"} if dist.slices else set()
    different = [name for name, value in trainer.machine.items() if before.get(name) != value and name not in free]
    if different and not allow_change:
        name = different[0]
        raise BardletError(f"{run}: {name} was {before.get(name)}, is {trainer.machine[name]} here, so the run "
                           "would not continue bit for bit; continue anyway with --allow-change")
    if lost := bool(dist.broadcast_int(int(dist.main and run_folder.repair_root(run)))):
        trainer.record.update(finished=None, selected_by=None, selected_step=None, val_loss=None, averaged=None)
    elif finished:
        raise _finished(run, done)
    restore(trainer, folder, best_is_lost=lost)
    return trainer


def _finished(run: Path, steps: int) -> BardletError:
    texts = ""  # without them, the command would train on the default text
    with suppress(BardletError):
        config, _ = run_folder.settings(run)
        texts = "".join(f"{quoted(name)} " for name in config.text) if isinstance(config, TrainConfig) else ""
    return BardletError(f"{run}: finished, all {steps:,} steps are done; train longer with `bardlet resume "
                        f"{quoted(run)} --minutes 5 --allow-change` (or --steps N), "
                        f"or start a new run with `bardlet train {texts}--init {quoted(run)}`")


def _same_text(run: Path, record: dict[str, Any], stage: AnyStage, allow_change: bool) -> None:
    """Raise BardletError if the text changed since the run started, unless `allow_change`."""
    if (name := stage.changed_text(record)) and not allow_change:
        raise BardletError(f"{run}: the text {name} changed since the run started; "
                           "restore it, or continue with --allow-change")


def _same_reward(run: Path, config: Settings, reward: str | None) -> None:
    """Raise BardletError if the run needs its reward command again, or if another reward is given."""
    known: str | None = getattr(config, "reward", None)
    missing = is_command(known) and reward is None
    if missing or reward not in (None, known):
        if known is None:
            raise BardletError(f"--reward: `bardlet {config.command}` has no rewards; drop it")
        command = f"bardlet resume {quoted(run)} --reward {shlex.quote(known)}"
        raise BardletError(f"{run}: its rewards come from `{known}`; " + (
            f"if that is a command, run `{command}` (bardlet never runs a command that only a file names); if it is a "
            "reward model, its folder is missing: restore it" if missing else
            f"--reward {reward} would change the run; drop it"))


def _check_steps(run: Path, steps: int, allow_change: bool) -> None:
    """Raise BardletError unless `steps` is more than the run has done, and may be changed."""
    if steps < 1:
        raise BardletError(f"--steps {steps}: must be more than 0")
    if (newest := checkpoint.newest_metadata(run)) and steps <= (done := newest["step"]):
        raise BardletError(f"--steps {steps}: {console.count(done, 'step')} of {run} are already done; "
                           "name a larger number")
    if not allow_change:
        raise BardletError(f"--steps {steps} changes the schedule of the run; add --allow-change")


def _steps_after(run: Path, minutes: float, allow_change: bool) -> int:
    """Return the number of steps of a run that trains `minutes` longer at its pace, which its evaluations slow down."""
    if not 0 < minutes < math.inf:
        raise BardletError(f"--minutes {minutes:g}: must be more than 0, and finite")
    if (newest := checkpoint.newest_metadata(run)) is None or not newest["step"]:
        raise BardletError(f"--minutes {minutes:g}: {run} has no checkpoint yet, so its pace is unknown; "
                           "name its number of steps with --steps")
    trained = max(newest["seconds"], newest.get("elapsed", 0.0) - newest.get("prepared", 0.0))
    steps = int(newest["step"] + max(1, round(60 * minutes * newest["step"] / max(trained, 1e-9))))
    if not allow_change:
        planned = f", or finish it as it was planned: `bardlet resume {quoted(run)}`"
        raise BardletError(f"--minutes {minutes:g} changes the schedule of the run: {minutes:g} minutes more make "
                           f"about {steps:,} steps; add --allow-change{planned * (newest['step'] < newest['steps'])}")
    return steps


def _change_steps(trainer: Trainer, steps: int) -> None:
    """Set a new total number of steps, which the clock no longer changes."""
    before = [event for event in trainer.state.replans if event[0] < trainer.state.step] or [(0, trainer.state.steps)]
    trainer.state.steps, trainer.state.replans = steps, [*before, (trainer.state.step, steps)]
    trainer.config = replace(trainer.config, replans=tuple(trainer.state.replans))
    # reasons, limit and prediction belong to the old plan
    trainer.record.update(minutes=None, finished=False, reasons=None, most_steps=None, expected=None)


# ---------------------------------------------------------------- to the end


def run_to_end(trainer: Trainer, stage: AnyStage, resumed_from: int | None, started: float) -> dict[str, Any]:
    """Train, write the model card and the curve, and print where they are. Return what --json prints.

    started: start of this command (time.monotonic); the preparation counts as time of the run.
    """
    config = trainer.config
    if config.eval_every is None:
        config = replace(config, eval_every=clock.steps_per_evaluation(trainer))
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
            if trainer.dist.world > 1 or "SLURM_JOB_ID" in os.environ:
                trainer.record.launch = heartbeat.launch()
        try:
            _fit(trainer, stage, started)
            return summary.say_result(trainer, stage, resumed_from)
        except BaseException as error:
            # nothing was saved yet: the folder is useless
            if resumed_from is None and trainer.record.saved is None and not checkpoint.steps_saved(trainer.run):
                shutil.rmtree(trainer.run, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                raise Stopped(trainer.run, trainer.state.step, getattr(error, "number", signal.SIGINT)) from None
            raise


def _fit(trainer: Trainer, stage: AnyStage, started: float) -> None:
    def no_clock(state: State) -> None:
        return None

    minutes = trainer.record.minutes
    replan = clock.replanner(60 * minutes, trainer.record.most_steps, contention.slowdown) if minutes else no_clock
    if trainer.dist.main:
        _prepare_folder(trainer, stage)
    if getattr(trainer.config, "watch", False) and trainer.state.step == 0:
        with parallelize.whole(trainer.model):
            if trainer.dist.main:
                _sample(trainer, stage, 0)
    if not trainer.dist.main:
        _seconds_spent(trainer.state, started)
        fit(trainer, replan)
        return
    active_trackers = trackers.trackers(trainer.config, trainer.run)
    reported: dict[str, int] = {}
    with console.training_progress(stage.unit, 60 * minutes if minutes else None) as watch:
        def on_step(line: dict[str, Any]) -> None:
            watch(line)
            if trainer.config.samples and trainer.state.evaluated == line["step"]:
                _sample(trainer, stage, line["step"])
            if line["step"] % max(1, trainer.state.steps // diagnosis.CHECKS) == 0 or line["step"] == line["steps"]:
                _diagnose(trainer, stage, reported)
            if active_trackers and line["step"] % trainer.config.log_every == 0:
                values = {name: line[name] for name in ("train_loss", "val_loss", "lr") if line[name] is not None}
                for tracker in active_trackers:
                    tracker(line["step"], values)

        _seconds_spent(trainer.state, started)
        try:
            fit(trainer, replan, on_step, replanned=lambda: _predict_again(trainer, stage))
        except BardletError:  # the diagnosis may give the reason
            _diagnose(trainer, stage, reported)
            raise


def _prepare_folder(trainer: Trainer, stage: AnyStage) -> None:
    """Write run.toml, and at the start of a run everything that its folder holds besides weights."""
    write_run(trainer)
    if trainer.state.step == 0:
        for name in ("metrics.jsonl", samples.NAME, "model.safetensors"):  # of a process that saved no checkpoint
            (trainer.run / name).unlink(missing_ok=True)
        hf.write_folder(trainer.run, trainer.model, stage.data.tokenizer)


def _sample(trainer: Trainer, stage: AnyStage, step: int) -> None:
    """Append a sample of the current weights to samples.jsonl; with --watch, print it."""
    with eager(trainer.model), eval_mode(trainer.model):
        text = stage.sample(trainer, trainer.config.sample_tokens)
    samples.append(trainer.run, step, text)
    if getattr(trainer.config, "watch", False):
        console.say(f"\n{f'after step {step:,}' if step else 'before training'}\n\n{text}\n")


def _predict_again(trainer: Trainer, stage: AnyStage) -> str:
    """Predict the loss of a new plan, and return it for a message."""
    stage.predict(trainer)
    text = stage.prediction() if trainer.record.reasons is not None else ""
    return f"; predicted validation loss: {text}" if trainer.record.expected else f"; {text}" * bool(text)


def _seconds_spent(state: State, started: float) -> None:
    """Count the time since `started`, when no step ran, as time of the run."""
    spent = time.monotonic() - started
    state.elapsed += spent
    state.prepared += spent


def _diagnose(trainer: Trainer, stage: AnyStage, reported: dict[str, int]) -> None:
    """Log the findings about the losses or the rollouts, each once, and a refutation of overfitting.

    reported: the step of each finding so far, by its subject.
    """
    lines, record, config = metrics.read_metrics(trainer.run), trainer.record.mapping(), trainer.config
    findings = (rollout_diagnosis.of_rollouts(lines, config, trainer.state.steps, record)
                if isinstance(config, RolloutConfig) else
                diagnosis.of_losses(lines, config, trainer.state.steps, record))
    for finding in findings:
        if finding.about not in reported:
            reported[finding.about] = trainer.state.step
            log.warning(finding.message)
    if "fit" in reported and (refutation := diagnosis.refutation(lines, reported["fit"])):
        del reported["fit"]
        log.warning(refutation)
