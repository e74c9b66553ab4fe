"""`bardlet resume DIR`: continue a run exactly where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse

USAGE = Usage(
    "resume", "RUN [OPTIONS]",
    "Continue a run exactly where it stopped: with the same weights, optimizer state and batches, bit for bit.",
    (("bardlet resume runs/my-qwen3", "continue after Ctrl-C, a crash or a power cut"),
     ("bardlet resume runs/my-qwen3 --steps 4000 --allow-change", "train longer")),
    (Group("changes", ("steps", "minutes", "allow_change", "reward")), Group("output", ("json",))),
    positionals={"run": "RUN"}, metavars={"reward": "COMMAND"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    run: str
    """The run folder."""
    steps: int | None = None
    """New total number of steps. This changes the run: it needs --allow-change."""
    minutes: float | None = None
    """Train about M minutes longer, at the pace so far, in place of --steps. It needs --allow-change."""
    allow_change: bool = False
    """Continue even if machine, precision, compiler or text changed. The result is then not bit for bit the same."""
    reward: str | None = None
    """The run's reward command. Repeat it here: bardlet never runs a command that only a file names."""
    json: bool = False
    """Print one JSON object on the last line."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    command = parse(Command, argv, USAGE)
    from bardlet import runner

    result = runner.resume(Path(command.run), command.reward, command.steps, command.allow_change,
                           command.minutes)
    if command.json and result:
        console.say_json(result)
    return 0
