"""`bardlet check FILE[:NAME]`: test a learner's own code of the lecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.errors import BardletError

if TYPE_CHECKING:
    from bardlet.ladder.check.run import Verdict

USAGE = Usage(
    "check", "FILE[:NAME] [OPTIONS]",
    "Test your own code of the lecture: a Head, a Block, a whole model. check runs the classes of the file in a "
    "process of its own with limits, but with your rights: check only files that you would run. It never runs the "
    "training loop. The exit code is 0 without findings, 1 with findings, and 2 if nothing could be tested.",
    (("bardlet check my_gpt.py", "test every class of the file"),
     ("bardlet check my_gpt.py:Head --rung 3", "test one class, as of the lecture's rung 3"),
     ("bardlet check lecture.ipynb --json", "a notebook; the findings as JSON")),
    (Group("check", ("rung", "seconds")), Group("output", ("json",))), positionals={"file": "FILE[:NAME]"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    file: str
    """A Python file or a notebook; with :NAME, one class of it."""
    rung: int | None = None
    """The rung of the ladder that the code follows, 1 to 13 (default: a guess from the file)."""
    seconds: float = 30.0
    """Time limit."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.rung is not None and not 1 <= self.rung <= 13:
            raise BardletError(f"--rung {self.rung}: must be from 1 to 13; `bardlet ladder --help` lists the rungs")
        if not 1 <= self.seconds <= 3600:
            raise BardletError(f"--seconds {self.seconds:g}: must be from 1 to 3600")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    try:
        command = parse(Command, argv, USAGE)
    except BardletError as error:
        error.exit_code = 2  # type: ignore[attr-defined]
        raise
    console.show_notices()
    from bardlet.ladder.check import run

    path, name = run.split(command.file)
    console.say(f"check runs {path} in a process of its own, for at most {command.seconds:g} s")
    verdict = run.check(Path(path), name, command.rung, command.seconds)
    show(verdict)
    if command.json:
        console.say_json({
            "rung": verdict.rung, "guessed": verdict.guessed, "ended": verdict.ended,
            "findings": [{"name": finding.name, "where": finding.where, "said": finding.sentence()}
                         for finding in verdict.findings],
            "passed": verdict.passed, "untested": verdict.untested, "notes": list(verdict.notes)})
    return 1 if verdict.findings else 0


def show(verdict: Verdict) -> None:
    """Print a line for each finding, and one for what holds in each class."""
    guessed = ", guessed; name another with --rung" * verdict.guessed
    console.say(f"rung {verdict.rung}{guessed}")
    for where, what in verdict.passed.items():
        if what:
            console.say(f"ok       {where}: {', '.join(what)}")
    for finding in verdict.findings:
        console.say(f"finding  {finding.sentence()}")
    for where, reason in verdict.untested.items():
        console.say(f"untested {where}: {reason}")
    for note in verdict.notes:
        console.say(f"note     {note}")
    if verdict.ended:
        console.say(f"ended    {verdict.ended}")
    count = console.count(len(verdict.findings), "finding")
    console.say(count if verdict.findings else "no findings")
