"""`bardlet resume DIR`: go on exactly where a run stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bardlet.cli import console, train
from bardlet.cli.options import parse
from bardlet.config import TrainConfig
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.data import Prepared
    from bardlet.dist import Dist
    from bardlet.train import Trainer


@dataclass(frozen=True)
class Command:
    """Go on exactly where a run stopped: same weights, same optimizer, same batches."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    steps: int | None = None
    """Another number of steps in all (a change: needs --allow-change)."""
    allow_change: bool = False
    """Go on although the machine, the precision, the compiler or the text is another: no longer bit for bit."""
    json: bool = False
    """Print one JSON object on one line, last."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    command = parse(Command, argv, "resume")
    from bardlet import checkpoint
    from bardlet import dist as distributed

    run = Path(command.run)
    config, record = checkpoint.read_run(run)
    begun = time.monotonic()
    with distributed.connect(config.device) as dist, checkpoint.locked(run) if dist.main else nullcontext():
        console.show_notices(dist.main)
        trainer, data = continued(run, config, record, dist, command)
        trainer.state.elapsed += time.monotonic() - begun
        step = trainer.state.step
        if step >= trainer.state.steps:
            raise BardletError(f"{run}: all its {step:,} steps are done; --steps N --allow-change trains on, "
                               f"`bardlet train --init {run}` starts a new run from it")
        if dist.main:
            console.say(f"going on after step {step:,} of {trainer.state.steps:,}")
        summary = train.run_to_end(trainer, data, resumed_from=step)
        if command.json and dist.main:
            console.say_json(summary)
    return 0


def continued(run: Path, config: TrainConfig, record: dict[str, Any], dist: Dist,
              command: Command) -> tuple[Trainer, Prepared]:
    """The run as its newest whole checkpoint left it."""
    from bardlet import checkpoint, corpus, hf, tokenizer
    from bardlet.train import restore

    if "text_hash" not in record:
        raise BardletError(f"{run / 'run.toml'}: no [record] of the text in it, so the run cannot go on; "
                           f"put back a copy, or start a new run with `bardlet train --init {run}`")
    folder = checkpoint.newest_whole(run)
    checkpoint.verify_root(run, folder)
    words = tokenizer.load(run)
    found = corpus.find(config.text, config.field)
    if found.hash != record["text_hash"] and not command.allow_change:
        raise BardletError(f"{run}: the text {found.name} is not the one that the run began with; "
                           "put it back, or go on with --allow-change")
    data = train.prepare(found, config, words, dist)
    shape = replace(hf.read_model_config(run), dropout=config.dropout)
    model = hf.build(shape, hf.read_tensors(folder / "model.safetensors"), run)
    if command.steps is not None:
        if not command.allow_change:
            raise BardletError(f"--steps {command.steps} changes the schedule of the run: add --allow-change")
        config = replace(config, replans=())
    trainer = train.assemble(run, model, data, config, dist, record)
    if config.compile == "on":
        train.choose_compile(trainer, None)
    before = hf.read_json(folder / "trainer.json")["machine"]
    odd = [name for name, value in trainer.machine.items() if before.get(name) != value]
    if odd and not command.allow_change:
        raise BardletError(f"{run}: {odd[0]} was {before.get(odd[0])}, is {trainer.machine[odd[0]]} here, so the run "
                           "would not go on bit for bit; --allow-change goes on all the same")
    restore(trainer, folder)
    if command.steps is not None:
        trainer.state.steps, trainer.state.replans = command.steps, []
    return trainer, data
