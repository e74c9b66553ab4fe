"""`bardlet check FILE[:NAME]`: test a learner's own code of the lecture, or an exercise of the course."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bardlet import console
from bardlet.cli.parser import Group, Usage, parse
from bardlet.errors import BardletError

USAGE = Usage(
    "check", "[FILE[:NAME]] [OPTIONS]",
    "Test your own code of the lecture: a Head, a Block, a whole model, or an exercise of the course. check runs the "
    "classes of the file in a process of its own with limits, but with your rights: check only files that you would "
    "run. It never runs the training loop. The exit code is 0 without findings, 1 with findings, and 2 if not "
    "everything could be tested. Without a file, check lists the exercises.",
    (("bardlet check my_gpt.py", "test every class of the file"),
     ("bardlet check my_gpt.py:Head --rung 3", "test one class, as of the lecture's rung 3"),
     ("bardlet check lecture.ipynb --json", "a notebook; the findings as JSON"),
     ("bardlet check --start exercises", "the course's exercises: copy their starter files"),
     ("bardlet check exercises/03_one_head.py --hint", "the next of three hints")),
    (Group("check", ("rung", "seconds")), Group("exercises", ("start", "hint")), Group("output", ("json",))),
    positionals={"file": "FILE[:NAME]"}, metavars={"start": "DIR"})


@dataclass(frozen=True)
class Command:
    """The command line."""

    file: str = ""
    """A Python file or a notebook; with :NAME, one class of it."""
    rung: int | None = None
    """The rung of the ladder that the code follows, 1 to 13 (default: a guess from the file)."""
    seconds: float = 30.0
    """Time limit."""
    start: str = ""
    """Copy the starter files of the exercises to a folder; files that exist stay as they are."""
    hint: bool = False
    """Print the next of three hints for the exercise of the file."""
    json: bool = False
    """Print one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.rung is not None and not 1 <= self.rung <= 13:
            raise BardletError(f"--rung {self.rung}: must be from 1 to 13; `bardlet ladder --help` lists the rungs")
        if not 1 <= self.seconds <= 3600:
            raise BardletError(f"--seconds {self.seconds:g}: must be from 1 to 3600")
        if self.start and self.file:
            raise BardletError("--start copies the starter files and checks nothing; leave out the file")
        if self.hint and not self.file:
            raise BardletError("--hint needs the file of an exercise, as in: bardlet check exercises/03_one_head.py "
                               "--hint")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    try:
        command = parse(Command, argv, USAGE)
    except BardletError as error:
        error.exit_code = 2  # type: ignore[attr-defined]
        raise
    console.show_notices()
    from bardlet.cli import exercises, findings

    if not command.file:
        return exercises.start(Path(command.start), command.json) if command.start else exercises.listed(command.json)
    from bardlet.ladder.check import run

    file, name = run.split(command.file)
    path = Path(file)
    exercise = None if name or command.rung else exercises.of(path)
    if command.hint:
        return exercises.hint(path, exercise, command.json)
    if exercise:
        return exercises.check(path, exercise, command.seconds, command.json)
    console.say(f"check runs {path} in a process of its own, for at most {command.seconds:g} s")
    verdict = run.check(path, name, command.rung, command.seconds)
    guessed = ", guessed; name another with --rung" * verdict.guessed
    console.say(f"rung {verdict.rung}{guessed}")
    findings.show(verdict)
    if command.json:
        console.say_json(findings.as_json(verdict))
    return findings.exit_code(verdict)
