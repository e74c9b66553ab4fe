"""`bardlet resume DIR`: go on exactly where a run stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bardlet import console
from bardlet.cli import train
from bardlet.cli.options import parse
from bardlet.config.settings import TrainConfig
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.data.shards import Progress
    from bardlet.runtime.distributed import Dist
    from bardlet.training.state import Trainer


@dataclass(frozen=True)
class Command:
    """Go on exactly where a run stopped: same weights, same optimizer, same batches."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    steps: int | None = None
    """Another number of steps in all (a change: needs --allow-change)."""
    allow_change: bool = False
    """Go on although the machine, the precision, the compiler or the text is another: no longer bit for bit."""
    reward: str | None = None
    """The command that says what answers are worth, once more: no program is run because a file names it."""
    json: bool = False
    """Print one JSON object on one line, last."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "resume")
    from bardlet.run import checkpoint, lock
    from bardlet.run import folder as run_folder
    from bardlet.runtime import distributed

    run = Path(command.run)
    if command.steps is not None and not command.allow_change:
        raise BardletError(f"--steps {command.steps} changes the schedule of the run: add --allow-change")
    console.show_notices(os.environ.get("RANK", "0") == "0")
    config, record = run_folder.settings(run, command.allow_change)
    _same_reward(run, config, command)
    begun = time.monotonic()
    with distributed.connect(config.device) as dist, lock.locked(run) if dist.main else nullcontext():
        if dist.main:
            run_folder.sweep(run)
        with console.preparing(dist.main) as progress:
            go_on = continued if checkpoint.steps_saved(run) or record.get("saved") else begun_again
            trainer, data = go_on(run, config, record, dist, command, progress)
        if command.steps is not None:
            _plan_again(trainer, command.steps)
        step = trainer.state.step
        if step >= trainer.state.steps and record.get("finished"):
            raise BardletError(f"{run}: all its {step:,} steps are done; --steps N --allow-change trains on, "
                               f"`bardlet train --init {run}` starts a new run from it")
        if dist.main:
            console.say(f"going on after step {step:,} of {trainer.state.steps:,}" if step
                        else "it ended before its first checkpoint, and begins again")
        summary = train.run_to_end(trainer, data, resumed_from=step, begun=begun)
        if command.json and dist.main:
            console.say_json(summary)
    return 0


def begun_again(run: Path, config: TrainConfig, record: dict[str, Any], dist: Dist, command: Command,
                progress: Progress | None) -> tuple[Trainer, Any]:
    """The run as it began: it has no checkpoint yet, so nothing is lost; its settings and their plan stay."""
    from bardlet.planning import compilation

    trainer, data = train.stage_of(config).new_trainer(config, dist, None, progress=progress, run=run)
    _same_text(run, record, trainer.record["text"], trainer.record["text_hash"], command)
    for name in ("base_hash", "reward_hash"):
        if record.get(name, trainer.record.get(name)) != trainer.record.get(name):
            what = config.init if name == "base_hash" else config.reward
            raise BardletError(f"{run}: {what} is not the model any more that the run began with; put it back")
    trainer.record = {**record, **trainer.record, "minutes": record.get("minutes")}  # the clock goes on, too
    compilation.choose_compile(trainer)
    return trainer, data


def continued(run: Path, config: TrainConfig, record: dict[str, Any], dist: Dist, command: Command,
              progress: Progress | None) -> tuple[Trainer, Any]:
    """The run as its newest whole checkpoint left it; with other --steps when that was asked for."""
    from bardlet import tokenizer
    from bardlet.planning import compilation
    from bardlet.run import checkpoint, hf
    from bardlet.run import folder as run_folder
    from bardlet.training.checkpointing import restore

    stage = train.stage_of(config)
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
    _same_text(run, record, found.name, found.hash, command)
    data = stage.prepare(found, config, words, dist, progress)
    shape = replace(hf.read_model_config(run), dropout=config.dropout)
    model = hf.build(shape, hf.read_tensors(folder / "model.safetensors"), run)
    trainer = stage.assemble(run, model, data, config, dist, record, resumed=True)
    if config.compile == "on":
        compilation.choose_compile(trainer)
    before = checkpoint.read_facts(folder)["machine"]
    odd = [name for name, value in trainer.machine.items() if before.get(name) != value]
    if odd and not command.allow_change:
        raise BardletError(f"{run}: {odd[0]} was {before.get(odd[0])}, is {trainer.machine[odd[0]]} here, so the run "
                           "would not go on bit for bit; --allow-change goes on all the same")
    if lost := bool(dist.from_main(int(dist.main and run_folder.mend_root(run)))):
        for name in ("finished", "selected_by", "selected_step", "val_loss", "averaged"):
            record.pop(name, None)
    restore(trainer, folder, best_is_lost=lost)
    return trainer, data


def _same_text(run: Path, record: dict[str, Any], name: str, digest: str, command: Command) -> None:
    """BardletError where a text is not the one that is on record, unless that is to be allowed."""
    if digest != record.get("text_hash") and not command.allow_change:
        raise BardletError(f"{run}: the text {name} is not the one that the run began with; "
                           "put it back, or go on with --allow-change")


def _same_reward(run: Path, config: TrainConfig, command: Command) -> None:
    """BardletError where a run gets its rewards from a program and nobody typed which, or another reward was typed."""
    from bardlet.stages import rewards

    asked = rewards.is_command(config.reward) and command.reward is None
    if asked or command.reward not in (None, config.reward):
        if config.reward is None:
            raise BardletError(f"--reward: a run of `bardlet {config.stage}` gets no rewards; leave it out")
        raise BardletError(f"{run}: what its answers are worth is said by `{config.reward}`; " + (
            f"if that is a program, `bardlet resume {run} --reward '{config.reward}'` runs it again (none is run "
            "because a file names it); if a reward model, its folder is gone: put it back" if asked else
            f"--reward {command.reward} would be another run"))


def _plan_again(t: Trainer, steps: int) -> None:
    """Another number of steps from here on: an event as a clock's decision is one, and the clock has no more say."""
    before = [event for event in t.state.replans if event[0] < t.state.step] or [(0, t.state.steps)]
    t.state.steps, t.state.replans = steps, [*before, (t.state.step, steps)]
    t.config = replace(t.config, replans=tuple(t.state.replans))
    t.record.update(minutes=None, finished=False)
    for name in ("reasons", "most_steps", "expected"):  # they were those of the old plan
        t.record.pop(name, None)
