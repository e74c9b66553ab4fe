"""`bardlet resume DIR`: go on exactly where a run stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bardlet import console
from bardlet.cli.options import parse


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
    from bardlet import runner

    result = runner.resume(Path(command.run), command.reward, command.steps, command.allow_change)
    if command.json and result:
        console.say_json(result)
    return 0
