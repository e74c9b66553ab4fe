"""Code shared by the training commands: options of a run, groups of the help, and the start of a run."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bardlet import console
from bardlet.cli.parser import Group
from bardlet.config.paths import given
from bardlet.config.settings import Settings
from bardlet.errors import BardletError, quoted

log = logging.getLogger("bardlet")


@dataclass(frozen=True)
class RunOptions:
    """Options of a training command that are not settings of the run."""

    out: str | None = None
    """Run folder to create (default: runs/NAME)."""
    config: str | None = None
    """Read settings from this TOML file. Settings on the command line take precedence."""
    plan: bool = False
    """Print the plan and stop."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("out", "config"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, given(path))


NOT_TYPED = ("replans",)
"""Settings that only files can hold."""

MACHINE = Group("machine", ("device", "dtype", "compile"),
                ("threads", "deterministic", "shard", "elastic", "recompute"))
OUTPUT = Group("output", ("out", "plan", "config", "json"), ("sample_tokens", "tensorboard", "wandb"))
OPTIMIZER = ("optimizer", "min_lr_ratio", "schedule", "warmup_steps", "decay_share", "weight_decay", "beta1", "beta2",
             "grad_clip")
CHECKPOINTS = ("on_nan", "eval_every", "eval_tokens", "save_every", "keep_checkpoints", "log_every")


def start(config: Settings, options: RunOptions, started: float) -> int:
    """Start a run and train to its end; return the exit code. started: when the command began (time.monotonic)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and getattr(config, "batch_size", None):
        config.check_parts(config.elastic or world)
    for name in config.text:
        if os.path.exists(Path(name, "run.toml")):
            run = quoted(name)
            raise BardletError(f"{name}: a run folder, not a text; continue the run with `bardlet resume {run}`, or "
                               f"start from its weights with `bardlet train TEXT --init {run}`")
    try:
        from bardlet import runner

        result = runner.start(config, options.out, started, options.plan)
    except KeyboardInterrupt as interrupt:  # after the first step it is `Stopped`, which says how to continue
        if world == 1:  # torchrun may have restarted this process, and its run
            interrupt.args = ("interrupted before the first step; nothing was trained or saved",)
        raise
    if options.json and result:
        console.say_json(result)
    return 0


def split(values: dict[str, Any]) -> tuple[RunOptions, dict[str, Any], float]:
    """Return (options, settings, now) of the values on a command line."""
    names = {each.name for each in fields(RunOptions)}
    options = RunOptions(**{name: value for name, value in values.items() if name in names})
    return options, {name: value for name, value in values.items() if name not in names}, time.monotonic()


def config_file(argv: Sequence[str]) -> Path | None:
    """Return the file that --config names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    with suppress(argparse.ArgumentError):  # --config without a value: the command's own parser explains
        file = parser.parse_known_args(list(argv))[0].config
        return Path(given(file)) if file else None
    return None
