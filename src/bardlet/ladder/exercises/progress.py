"""A reader's progress through the exercises: a small JSON file beside the starter files.

It is data from a file that anybody may have edited: whatever does not fit is left out.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bardlet.data.named import cache_folder
from bardlet.errors import BardletError
from bardlet.ladder.exercises.table import BY_NAME, EXERCISES, Exercise
from bardlet.runtime.atomic import explain_write_errors, write_json

NAME = ".bardlet-exercises.json"
MOST_BYTES = 1 << 16
HINTS = 3
DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


@dataclass
class Progress:
    """The progress in one folder. done: exercise -> date of the first time; hints: exercise -> how many were shown."""

    folder: Path
    done: dict[str, str] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)

    def finish(self, exercise: Exercise) -> None:
        """Record an exercise as done, today, unless it was done before."""
        self.done.setdefault(exercise.name, datetime.date.today().isoformat())
        self._write()

    def next_hint(self, exercise: Exercise) -> int:
        """Count one more hint, and return its number, 1 to 3; 3 again if all were shown."""
        number = min(self.hints.get(exercise.name, 0) + 1, HINTS)
        self.hints[exercise.name] = number
        self._write()
        return number

    def state(self, exercise: Exercise) -> str:
        """Return the state of an exercise in words; empty if it was not begun."""
        hints = self.hints.get(exercise.name, 0)
        taken = f"{hints} hint{'s' * (hints > 1)}" if hints else ""
        done = f"done {self.done[exercise.name]}" if exercise.name in self.done else ""
        return ", ".join(part for part in (done, taken) if part)

    def upcoming(self, exercise: Exercise | None = None) -> Exercise | None:
        """Return the first exercise after this one, in a circle, that is not done; None if all are."""
        first = 0 if exercise is None else EXERCISES.index(exercise) + 1
        return next((each for each in (*EXERCISES[first:], *EXERCISES[:first]) if each.name not in self.done), None)

    def _write(self) -> None:
        """Write the file; to the cache folder if the folder cannot be written to."""
        names = sorted({*self.done, *self.hints})
        value = {"exercises": {name: {"done": self.done.get(name), "hints": self.hints.get(name, 0)}
                               for name in names}}
        try:
            if not os.access(self.folder, os.W_OK):
                raise BardletError(f"{self.folder}: cannot be written")
            write_json(self.folder / NAME, value)
        except BardletError:
            elsewhere = _elsewhere(self.folder)
            try:
                with explain_write_errors(elsewhere):
                    elsewhere.parent.mkdir(parents=True, exist_ok=True)
                write_json(elsewhere, value)
            except BardletError as error:
                logging.getLogger("bardlet").warning("your progress is not saved: %s", error)


def load(folder: Path) -> Progress:
    """Return the progress in a folder, of the entries that are whole."""
    progress = Progress(folder)
    for path in (folder / NAME, _elsewhere(folder)):
        for name, entry in _entries(path).items():
            if name not in BY_NAME or not isinstance(entry, dict):
                continue
            done, hints = entry.get("done"), entry.get("hints")
            if isinstance(done, str) and DATE.fullmatch(done):
                progress.done.setdefault(name, done)
            if type(hints) is int and 0 < hints <= HINTS:
                progress.hints[name] = max(hints, progress.hints.get(name, 0))
    return progress


def _entries(path: Path) -> dict[str, Any]:
    """Return the entries of a progress file; none of a file that is missing, too long or damaged."""
    try:
        if not path.exists():
            return {}
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too long")
        entries = json.loads(path.read_text(encoding="utf-8"))["exercises"]
        return dict(entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        logging.getLogger("bardlet").warning("%s is damaged and counts as empty; your next check or hint "
                                             "replaces it", path)
        return {}


def _elsewhere(folder: Path) -> Path:
    """Return the file in the cache folder for a folder that cannot be written to."""
    digest = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / "exercises" / f"{digest[:24]}.json"
