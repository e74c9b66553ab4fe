"""The exercises of the course in `bardlet check`: list them, copy their starter files, check one, print a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bardlet import console
from bardlet.cli import findings
from bardlet.errors import BardletError, quoted
from bardlet.ladder.check import run, source
from bardlet.ladder.check.run import NotChecked
from bardlet.ladder.exercises import progress, starters
from bardlet.ladder.exercises.progress import Progress
from bardlet.ladder.exercises.table import EXERCISES, Exercise

FOLDER = Path("exercises")
"""The usual folder of the starter files."""


def of(path: Path) -> Exercise | None:
    """Return the exercise of a file, or None.

    Raises:
        NotChecked: its line names no exercise.
    """
    try:
        return starters.find(path)
    except BardletError as error:
        raise NotChecked(str(error)) from None


def start(folder: Path, json: bool) -> int:
    """Copy the starter files, and return the exit code."""
    copied, kept = starters.copy(folder)
    there = f"; {kept} were there and stay as they are" if kept else ""
    console.say(f"{console.count(copied, 'starter file')} copied to {folder}{there}")
    _say_next(folder, progress.load(folder))
    if json:
        console.say_json({"folder": str(folder), "copied": copied, "kept": kept})
    return 0


def listed(json: bool) -> int:
    """Print every exercise with its state, and return the exit code."""
    folder = next((each for each in (Path(), FOLDER) if _is_exercises(each)), None)
    own = Progress(FOLDER) if folder is None else progress.load(folder)
    console.say(f"{len(EXERCISES)} exercises, {len(own.done)} done"
                + (f"; your files are in {folder.resolve().name}" if folder else ""))
    for exercise in EXERCISES:
        console.say(f"  {exercise.file:20} {exercise.title:30} {own.state(exercise)}".rstrip())
    if folder is None:
        console.say(f"copy the starter files: bardlet check --start {FOLDER}")
    else:
        _say_next(folder, own)
    if json:
        rows = [{"name": each.name, "file": each.file, "title": each.title, "rung": each.rung,
                 "done": own.done.get(each.name), "hints": own.hints.get(each.name, 0)} for each in EXERCISES]
        console.say_json({"folder": None if folder is None else str(folder), "exercises": rows})
    return 0


def _is_exercises(folder: Path) -> bool:
    """Return True if a folder has a starter file."""
    return any((folder / exercise.file).is_file() for exercise in EXERCISES)


def hint(path: Path, exercise: Exercise | None, json: bool) -> int:
    """Print the next hint for an exercise, and return the exit code.

    Raises:
        NotChecked: the file is missing, or has no exercise.
    """
    if exercise is None:
        raise NotChecked(f"{path}: {'names no exercise' if path.is_file() else 'no such file'}; "
                         f"copy the starter files: bardlet check --start {FOLDER}")
    number = progress.load(path.parent).next_hint(exercise)
    console.say(f"hint {number} of {len(exercise.hints)}: {exercise.hints[number - 1]}")
    if json:
        console.say_json({"exercise": exercise.name, "hint": number, "text": exercise.hints[number - 1]})
    return 0


def check(path: Path, exercise: Exercise, seconds: float, json: bool) -> int:
    """Check an exercise, keep it in the progress if it is done, and return the exit code.

    Raises:
        NotChecked: the file cannot be read, or ended the process.
    """
    try:
        missing = starters.unwritten(source.read(path))
    except BardletError as error:
        raise NotChecked(str(error)) from None
    console.say(f"exercise {exercise.file.split('_')[0].lstrip('0')}: {exercise.title}")
    verdict = None
    if not set(exercise.parts) <= set(missing):
        console.say(f"check runs {path} in a process of its own, for at most {seconds:g} s")
        verdict = run.check(path, None, exercise.rung, seconds, exercise.name)
        findings.show(verdict)
    done = not missing and verdict is not None and not (verdict.findings or verdict.untested or verdict.ended)
    own = progress.load(path.parent)
    if done:
        own.finish(exercise)
        console.say(f"done: {exercise.title}")
        _say_next(path.parent, own, exercise)
    else:
        if missing:
            console.say(f"not written yet: {', '.join(missing)}")
        console.say(f"explained in {exercise.where}, and on the course's page docs/{exercise.page}")
        if own.hints.get(exercise.name, 0) < len(exercise.hints):
            console.say(f"a hint: bardlet check {quoted(path)} --hint")
    if json:
        found: dict[str, Any] = findings.as_json(verdict) if verdict else {"findings": []}
        console.say_json({**found, "exercise": exercise.name, "missing": missing, "done": done})
    return 0 if done else 1


def _say_next(folder: Path, own: Progress, exercise: Exercise | None = None) -> None:
    """Name the next exercise that is not done."""
    upcoming = own.upcoming(exercise)
    if upcoming is None:
        console.say(f"all {len(EXERCISES)} exercises are done")
    elif (folder / upcoming.file).is_file():
        console.say(f"next: {upcoming.title}; complete the file, then: bardlet check {quoted(folder / upcoming.file)}")
    else:
        console.say(f"next: {upcoming.title}; copy its file: bardlet check --start {quoted(folder)}")
