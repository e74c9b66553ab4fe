"""Start a run, resume it, bring it to its end. The commands parse and print; what they call is here.

`start` takes settings and a stage's text to a trainer, plans its steps and trains; `resume` takes the trainer from the
newest whole checkpoint; both leave the model card, the curve and the mark that the run is finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bardlet import console, tokenizer
from bardlet.config.model import ModelConfig
from bardlet.config.settings import OF_REWARDS, TrainConfig, option
from bardlet.data.shards import Progress
from bardlet.errors import BardletError
from bardlet.planning import clock, compilation
from bardlet.planning.plan import short
from bardlet.planning.scaling_law import BAND
from bardlet.run import card, checkpoint, diagnosis, hf, lock, metrics, trackers
from bardlet.run import folder as run_folder
from bardlet.runtime import atomic, distributed, heartbeat
from bardlet.runtime.distributed import Dist
from bardlet.runtime.signals import Stopped
from bardlet.stages import dpo, pretrain, reward_model, rewards, rl, sft, translation
from bardlet.training.checkpointing import restore, write_run
from bardlet.training.state import State, Trainer
from bardlet.training.trainer import fit

log = logging.getLogger("bardlet")

RESULTS = ("bleu", "chrf", "val_loss_before", "ended", "accuracy", "longer", "margin", "accuracy_longer",
           "accuracy_shorter", "likes_length", "calibration_error", "reward_before", "reward_after", "sampled_before",
           "sampled_after", "kl", "answer_length", "different_before", "different", "distinct_before", "distinct")
"""What --json prints of the results of some stages."""


UNITS = {"sft": "answer tokens", "reward": "pairs", "dpo": "pairs", "ppo": "answer tokens", "grpo": "answer tokens"}
"""What the steps of some stages count."""


# ---------------------------------------------------------------- start and resume


def start(config: TrainConfig, out: str | None, given: Collection[str], in_file: Collection[str], begun: float,
          plan_only: bool = False) -> dict[str, Any]:
    """Begin a run and bring it to its end.

    Args:
        config: the settings; without steps and minutes pretraining takes five minutes.
        out: the run folder to make; None: runs/NAME.
        given: the settings that somebody typed.
        in_file: those that somebody's file of settings has.
        begun: when the time of --minutes began (of time.monotonic).
        plan_only: print the plan and stop.

    Returns:
        What `--json` prints; empty on the other ranks.
    """
    if config.steps is None and config.minutes is None and config.stage == "pretrain":
        config = replace(config, minutes=5.0)
    if _started_again(out):
        return resume(Path(str(out)), reward=config.reward if "reward" in given else None)
    stage = stage_of(config)
    with distributed.connect(config.device) as dist:
        console.show_notices(dist.main)
        with console.preparing(dist.main) as progress:
            trainer, data = stage.new_trainer(config, dist, out, given, progress, begun, in_file)
        estimated = plan_only and "reasons" in trainer.record  # by the machine's speed, not by this model's steps
        if config.minutes is None:
            compilation.choose_compile(trainer)
        elif not estimated:
            pretrain.plan_steps(trainer, config.minutes * 60, begun, {*given, *in_file})
        stage.expect(trainer, data)
        for found in diagnosis.of_text(trainer.record):
            log.warning(found.said)
        plan = _say_plan(trainer, data) if dist.main else {}
        return plan if plan_only else run_to_end(trainer, data, resumed_from=None, begun=begun)


def resume(run: Path, reward: str | None = None, steps: int | None = None,
           allow_change: bool = False) -> dict[str, Any]:
    """Go on exactly where a run stopped, and bring it to its end.

    Args:
        run: the run folder.
        reward: the program that scores completions, once more: none is run because a file names it.
        steps: another number of steps in all, which is a change.
        allow_change: go on although machine, precision, compiler, text or number of steps is another.

    Returns:
        What `--json` prints; empty on the other ranks.
    """
    if steps is not None and not allow_change:
        raise BardletError(f"--steps {steps} changes the schedule of the run: add --allow-change")
    console.show_notices(os.environ.get("RANK", "0") == "0")
    config, record = run_folder.settings(run, allow_change)
    _same_reward(run, config, reward)
    begun = time.monotonic()
    with distributed.connect(config.device) as dist, lock.locked(run) if dist.main else nullcontext():
        if dist.main:
            run_folder.sweep(run)
        with console.preparing(dist.main) as progress:
            go_on = continued if checkpoint.steps_saved(run) or record.get("saved") else begun_again
            trainer, data = go_on(run, config, record, dist, allow_change, progress)
        if steps is not None:
            _plan_again(trainer, steps)
        step = trainer.state.step
        if step >= trainer.state.steps and record.get("finished"):
            raise BardletError(f"{run}: all its {step:,} steps are done; --steps N --allow-change trains on, "
                               f"`bardlet train --init {run}` starts a new run from it")
        if dist.main:
            console.say(f"going on after step {step:,} of {trainer.state.steps:,}" if step
                        else "it ended before its first checkpoint, and begins again")
        return run_to_end(trainer, data, resumed_from=step, begun=begun)


def stage_of(config: TrainConfig) -> Any:
    """What these settings train: a file with the names of stages/pretrain.py."""
    if config.stage != "pretrain":
        return {"sft": sft, "reward": reward_model, "dpo": dpo, "ppo": rl, "grpo": rl}[config.stage]
    return translation if config.parallel else pretrain


def _started_again(out: str | None) -> bool:
    """Whether torchrun starts this command again (--max-restarts), and it had begun its run."""
    if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise BardletError("--max-restarts: processes that are started again must find their run; name it with --out")
    if heartbeat.attempt() == "0" or out is None or not (Path(out) / "run.toml").exists():
        return False
    return run_folder.settings(Path(out))[1].get("launch") == heartbeat.launch()


def begun_again(run: Path, config: TrainConfig, record: dict[str, Any], dist: Dist, allow_change: bool,
                progress: Progress | None) -> tuple[Trainer, Any]:
    """The run as it began: it has no checkpoint yet, so nothing is lost; its settings and their plan stay."""
    trainer, data = stage_of(config).new_trainer(config, dist, None, progress=progress, run=run)
    _same_text(run, record, trainer.record["text"], trainer.record["text_hash"], allow_change)
    for name in ("base_hash", "reward_hash"):
        if record.get(name, trainer.record.get(name)) != trainer.record.get(name):
            what = config.init if name == "base_hash" else config.reward
            raise BardletError(f"{run}: {what} is not the model any more that the run began with; put it back")
    trainer.record = {**record, **trainer.record, "minutes": record.get("minutes")}  # the clock goes on, too
    compilation.choose_compile(trainer)
    return trainer, data


def continued(run: Path, config: TrainConfig, record: dict[str, Any], dist: Dist, allow_change: bool,
              progress: Progress | None) -> tuple[Trainer, Any]:
    """The run as its newest whole checkpoint left it; with other --steps when that was asked for."""
    stage = stage_of(config)
    if "text_hash" not in record:
        raise BardletError(f"{run / 'run.toml'}: no [record] of the text in it, so the run cannot go on; "
                           f"put back a copy, or start a new run with `bardlet train --init {run}`")
    folder = checkpoint.newest_whole(run)
    run_folder.verify_root(run, folder)
    words = tokenizer.load(run)
    try:
        found = stage.find(config)
    except BardletError as error:
        raise BardletError(f"{run}: its text cannot be read ({error}); a path is relative to the folder in which the "
                           "run began: resume from there") from None
    _same_text(run, record, found.name, found.hash, allow_change)
    data = stage.prepare(found, config, words, dist, progress)
    shape = replace(hf.read_model_config(run), dropout=config.dropout)
    model = hf.build(shape, hf.read_tensors(folder / "model.safetensors"), run)
    trainer = stage.assemble(run, model, data, config, dist, record, resumed=True)
    if config.compile == "on":
        compilation.choose_compile(trainer)
    before = checkpoint.read_facts(folder)["machine"]
    odd = [name for name, value in trainer.machine.items() if before.get(name) != value]
    if odd and not allow_change:
        raise BardletError(f"{run}: {odd[0]} was {before.get(odd[0])}, is {trainer.machine[odd[0]]} here, so the run "
                           "would not go on bit for bit; --allow-change goes on all the same")
    if lost := bool(dist.from_main(int(dist.main and run_folder.mend_root(run)))):
        for name in ("finished", "selected_by", "selected_step", "val_loss", "averaged"):
            record.pop(name, None)
    restore(trainer, folder, best_is_lost=lost)
    return trainer, data


def _same_text(run: Path, record: dict[str, Any], name: str, digest: str, allow_change: bool) -> None:
    """BardletError where a text is not the one that is on record, unless that is to be allowed."""
    if digest != record.get("text_hash") and not allow_change:
        raise BardletError(f"{run}: the text {name} is not the one that the run began with; "
                           "put it back, or go on with --allow-change")


def _same_reward(run: Path, config: TrainConfig, reward: str | None) -> None:
    """BardletError where a run gets its rewards from a program and nobody typed which, or another reward was typed."""
    asked = rewards.is_command(config.reward) and reward is None
    if asked or reward not in (None, config.reward):
        if config.reward is None:
            raise BardletError(f"--reward: a run of `bardlet {config.stage}` gets no rewards; leave it out")
        raise BardletError(f"{run}: what its answers are worth is said by `{config.reward}`; " + (
            f"if that is a program, `bardlet resume {run} --reward '{config.reward}'` runs it again (none is run "
            "because a file names it); if a reward model, its folder is gone: put it back" if asked else
            f"--reward {reward} would be another run"))


def _plan_again(t: Trainer, steps: int) -> None:
    """Another number of steps from here on: an event as a clock's decision is one, and the clock has no more say."""
    before = [event for event in t.state.replans if event[0] < t.state.step] or [(0, t.state.steps)]
    t.state.steps, t.state.replans = steps, [*before, (t.state.step, steps)]
    t.config = replace(t.config, replans=tuple(t.state.replans))
    t.record.update(minutes=None, finished=False)
    for name in ("reasons", "most_steps", "expected"):  # they were those of the old plan
        t.record.pop(name, None)


# ---------------------------------------------------------------- the plan in words


def _say_plan(t: Trainer, data: Any) -> dict[str, Any]:
    """Print text, tokenizer, model and plan, and return the plan's figures."""
    c, tokens = t.config, t.config.tokens_per_step
    what, epochs = stage_of(c).said(t, data)
    steps = c.replans[-1][1] if c.replans else t.state.steps  # a run that is repeated knows what its clock decided
    for line in what:
        console.say(line)
    console.say(f"model: {c.model}, {_shape(t.model.config)}, context {c.block_size}, "
                f"{t.record['parameters']:,} parameters"
                + (f"; LoRA of rank {c.lora}: {t.record['trainable']:,} learn" if c.lora else ""))
    for reason in t.record.get("reasons", []):
        console.say(f"  {reason}")
    optimizer = "muon" if len(t.optimizers) > 1 else "adamw"  # a table has no matrices for Muon
    of_stage = {"sft": "conversations", "reward": "preferences", "dpo": "preferences", "ppo": "questions",
                "grpo": "questions"}
    material = of_stage.get(c.stage, "pairs" if c.parallel else "text")
    console.say(f"plan: {steps:,} steps of {'' if material == 'text' else 'up to '}{tokens:,} tokens "
                f"({short(epochs * steps / t.state.steps)} times the {material}), {optimizer}, "
                f"{c.dtype}{', compiled' if t.machine['compiled'] else ''}, "
                f"{console.count(t.machine['threads'], 'thread')}"
                + (f", to end within {_minutes(t.record['minutes'])}" if t.record.get("minutes") else ""))
    if expected := t.record.get("expected"):
        console.say(f"expected: a validation loss of {_band(expected)} nats per character")
    elif own := t.record.get("untold"):
        what = ", ".join(map(option, own)) if len(own) < 4 else "model, batch and rates"
        console.say(f"expected: nobody knows; a loss is foretold where bardlet chooses {what}, too")
    elif "most_steps" in t.record:
        console.say("expected: nobody knows; the text is too short to tell, or its end is unlike the rest")
    return {"steps": steps, "tokens_per_step": tokens, "parameters": t.record["parameters"], "model": c.model,
            "tokenizer": data.tokenizer.kind, "compiled": t.machine["compiled"], "expected": t.record.get("expected"),
            "reasons": t.record.get("reasons", [])}


def _band(expected: float) -> str:
    """An expected loss with the band that nearly all runs fall into."""
    return f"{expected:.2f} ({expected * (1 - BAND):.2f} to {expected * (1 + BAND):.2f})"


def _minutes(minutes: float) -> str:
    return "a minute" if minutes == 1 else f"{minutes:g} minutes"


def _shape(model: ModelConfig) -> str:
    """The size of a model in words; a rung of the ladder counts 1 of what it does not have yet."""
    if model.model == "bigram":
        return "a table"
    counts = ((model.n_layer, "layer"), (model.n_head, "head"), (model.n_embd, "channel"))
    encoder = f"{model.n_encoder_layer} and " if model.n_encoder_layer else ""
    return encoder + ", ".join(console.count(number, what) for number, what in counts)


# ---------------------------------------------------------------- to the end


def run_to_end(t: Trainer, data: Any, resumed_from: int | None, begun: float) -> dict[str, Any]:
    """Train, then leave the model card and the curve, and print where everything lies. Returns what --json prints.

    begun: when this command did (of time.monotonic): what was spent until the first step is part of the run's time.
    """
    t.config = replace(t.config,
                       eval_every=_eval_every(t) if t.config.eval_every is None else t.config.eval_every,
                       save_every=max(1, t.state.steps // 10) if t.config.save_every is None else t.config.save_every)
    if not t.dist.main:
        _fit(t, data, begun)
        return {}
    if resumed_from is None:
        t.run.mkdir(parents=True, exist_ok=True)
        atomic.sync_folder(t.run.parent)
    # a run that goes on is locked already, since before its checkpoint was read
    with lock.locked(t.run) if resumed_from is None else nullcontext():
        if resumed_from is None:
            run_folder.new_folder(t.run, "", held=True)  # another process may have been first, and be done
            run_folder.sweep(t.run)
            if t.dist.world > 1:
                t.record["launch"] = heartbeat.launch()
        try:
            _fit(t, data, begun)
            return _summary(t, data, resumed_from)
        except BaseException as error:
            # nothing was saved yet: what lies there is of no use to anybody
            if resumed_from is None and "saved" not in t.record and not checkpoint.steps_saved(t.run):
                shutil.rmtree(t.run, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                raise Stopped(t.run, t.state.step, getattr(error, "number", signal.SIGINT)) from None
            raise


def _eval_every(t: Trainer) -> int:
    """Steps between evaluations: about 20 in a run, or so many that they do not take longer than the training.

    A token that is looked at takes about a third of one that is learned from.
    """
    learned, looked_at = t.state.steps * t.config.tokens_per_step, t.record.get("val_tokens")
    number = clock.evaluations_for(3 * learned, looked_at, share=1) if looked_at else clock.EVALUATIONS
    return -(-t.state.steps // number)


def _fit(t: Trainer, data: Any, begun: float) -> None:
    def no_clock(state: State) -> None:
        return None

    minutes = t.record.get("minutes")
    replan = clock.replanner(60 * minutes, t.record.get("most_steps")) if minutes else no_clock
    if not t.dist.main:
        _time_spent(t.state, begun)
        fit(t, replan)
        return
    write_run(t)
    if t.state.step == 0:
        for name in ("metrics.jsonl", "model.safetensors"):  # of a process that ended before its first checkpoint
            (t.run / name).unlink(missing_ok=True)
        hf.write_folder(t.run, t.model, data.tokenizer)
    tell = trackers.trackers(t.config, t.run)
    told: set[str] = set()
    with console.training(UNITS.get(t.config.stage, "tokens")) as watch:

        def see(line: dict[str, Any]) -> None:
            watch(line)
            if line["step"] % max(1, t.state.steps // diagnosis.LOOKS) == 0 or line["step"] == t.state.steps:
                _diagnose(t, told)
            if tell and line["step"] % t.config.log_every == 0:
                values = {name: line[name] for name in ("train_loss", "val_loss", "lr") if line[name] is not None}
                for tracker in tell:
                    tracker(line["step"], values)

        _time_spent(t.state, begun)
        try:
            fit(t, replan, see)
        except BardletError:  # why, perhaps
            _diagnose(t, told)
            raise


def _time_spent(state: State, begun: float) -> None:
    """What was spent since `begun`, none of it in a step, is time of the run."""
    spent = time.monotonic() - begun
    state.elapsed += spent
    state.prepared += spent


def _diagnose(t: Trainer, told: set[str]) -> None:
    """Say what the losses tell, each thing once; those of answers that a model wrote itself tell nothing."""
    if t.config.stage in OF_REWARDS:
        return
    for found in diagnosis.of_losses(metrics.read_metrics(t.run), t.config, t.state.steps, t.record):
        if found.about not in told:
            told.add(found.about)
            log.warning(found.said)


def _summary(t: Trainer, data: Any, resumed_from: int | None) -> dict[str, Any]:
    facts, sample = stage_of(t.config).conclude(t, data)
    console.say(f"\n{sample}\n")
    mean = f", mean of the last {facts['averaged']:,} steps" if facts.get("averaged") else ""
    console.say(f"validation loss {card.loss_in_words(facts)} ({facts['selected_by']} weights, "
                f"step {facts['selected_step']:,}{mean}); {facts['steps']:,} steps in "
                f"{console.clock_time(facts['seconds'])}")
    if expected := facts.get("expected"):
        came, outside = facts["nats_per_char"], abs(facts["nats_per_char"] / expected - 1) > BAND
        console.say(f"expected: {_band(expected)} nats per character; came: {came:.4f}"
                    + (", which few texts do" if outside else ""))
    if t.config.parallel:
        console.say(f"held-out pairs: BLEU {facts['bleu']:.1f}, chrF {facts['chrf']:.1f} ({facts['bleu_signature']})")
    for line in getattr(stage_of(t.config), "results", lambda facts: [])(facts):
        console.say(line)
    use = {"pretrain": "translate" if t.config.parallel else "sample", "reward": ""}.get(t.config.stage, "chat")
    console.say(f"the run is in {t.run}: " + (f"`bardlet {use} {t.run}`, see " if use else "see ")
                + f"{t.run / 'loss.png'}")
    return {"run": str(t.run), "steps": t.state.step, "resumed_from": resumed_from,
            "seconds": round(t.state.seconds, 3), "train_loss": facts.get("train_loss"),
            "val_loss": facts["val_loss"], "nats_per_char": facts.get("nats_per_char"),
            "expected": facts.get("expected"), "selected_by": facts["selected_by"],
            "tokens_per_second": facts["tokens_per_second"], "parameters": facts["parameters"],
            **{name: facts[name] for name in RESULTS if name in facts}}
