"""The runs of the studio: a table, the curve and the settings of each, deleting with undo. Imports no torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote

from bardlet.api import runs as summaries
from bardlet.config.docs import docs, first_sentence
from bardlet.config.stages import config_class
from bardlet.config.toml import record_in, settings_in
from bardlet.errors import BardletError
from bardlet.planning import scaling_law
from bardlet.run import samples
from bardlet.run.record import Record, checked
from bardlet.server.errors import Refusal
from bardlet.server.studio.curves import Curve

KEPT_SECONDS = 7 * 86_400
"""Time for which a deleted run can be brought back."""
FIGURES = ("train_loss", "val_loss", "lr", "reward", "accuracy", "kl")
"""Figures of a run that have a chart."""


class Runs:
    """The runs below a folder. Methods read files: call them in a worker thread."""

    def __init__(self, root: Path, hidden: Path) -> None:
        """hidden: the folder for what was deleted."""
        self.root, self.trash = root, hidden / "trash"
        self._curves: dict[Path, Curve] = {}
        self._reading = Lock()
        """Held while a curve is read on: two requests may ask for one at a time."""
        self._summaries: dict[Path, tuple[Any, dict[str, Any]]] = {}

    # ---------------------------------------------------------------- the table

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each run, the newest first."""
        rows = [self.row(folder) for folder in self.folders()]
        return sorted(rows, key=lambda row: -row["modified"])

    def folders(self) -> Iterator[Path]:
        """Yield the run folders, at most three levels deep; links and hidden folders are not followed."""
        yield from _run_folders(self.root, 3)

    def row(self, folder: Path) -> dict[str, Any]:
        """Return the summary of a run, from memory if nothing changed since."""
        stamp = _stamp(folder)
        known = self._summaries.get(folder)
        if known is None or known[0] != stamp or known[1]["state"] == "running":
            row = asdict(summaries.summarize(folder))
            row["folder"], row["name"] = os.path.relpath(folder), self.name(folder)
            known = self._summaries[folder] = stamp, row
        return known[1]

    def name(self, folder: Path) -> str:
        """Return the name of a run: its path below the root."""
        return folder.relative_to(self.root).as_posix()

    def folder(self, name: str) -> Path:
        """Return the folder of a run. Refuse a name that none has."""
        parts = name.split("/")
        folder = self.root.joinpath(*parts)
        if (not all(part and not part.startswith(".") and "\\" not in part and "\0" not in part for part in parts)
                or len(parts) > 3 or any(path.is_symlink() for path in (folder, *folder.parents[: len(parts) - 1]))
                or not (folder / "run.toml").is_file()):
            raise Refusal(404, "There is no such run.", code="run_not_found")
        return folder

    def exists(self, name: str) -> bool:
        """Return True if a run may not take this name."""
        return os.path.lexists(self.root / name)

    def has(self, name: str) -> bool:
        """Return True if there is a run of this name."""
        return (self.root / name / "run.toml").is_file()

    # ---------------------------------------------------------------- one run

    def progress(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Return the curve of a run with what it is compared with; no points if they are those of `version`."""
        folder = self.folder(name)
        with self._reading:
            curve = self._curves.setdefault(folder, Curve(folder))
            curve.read()
            facts: dict[str, Any] = {"version": curve.version, "step": curve.step, "last": curve.last}
            if version != curve.version:
                facts["points"] = curve.points(*FIGURES)
            best = min(curve.lines["val_loss"].values) if "val_loss" in curve.lines else None
        row, record = self.row(folder), self._record(folder)
        characters = record.get("characters_per_token") if row["command"] == "train" else None
        expected, bigram = record.get("expected"), record.get("bigram")
        measured, whole = record.get("val_tokens"), record.get("val_tokens_of")
        return {
            **facts, "run": row, "now": time.time(), "minutes": record.get("minutes"),
            "unit": "character" if characters else "token", "per_token": characters or 1.0,
            "bigram": bigram, "evaluated": [measured, whole] if measured and whole and measured < whole else None,
            "band": scaling_law.band(expected, record.get("drift") or 0.0) if expected else None,
            "planned": self._planned(folder) or record.get("steps"), "samples": self.samples(folder),
            "reads_like": scaling_law.reads_like(best / characters, bigram) if best and characters else ""}

    def details(self, name: str) -> dict[str, Any]:
        """Return the settings and the record of a run, without paths, and what they mean."""
        folder = self.folder(name)
        settings = {key: value for key, value in settings_in(folder / "run.toml").items() if key != "replans"}
        kinds: tuple[type, ...] = (Record, config_class(settings))
        meanings = {key: first_sentence(text).partition(" (default")[0]
                    for kind in kinds for key, text in docs(kind).items()}
        for key in ("text", "init", "source", "target", "replay_text"):
            if value := settings.get(key):
                settings[key] = os.path.basename(value) if isinstance(value, str) else [
                    os.path.basename(str(each)) for each in value]
        return {"run": self.row(folder), "settings": settings, "record": self._record(folder),
                "meanings": meanings}

    def samples(self, folder: Path) -> list[dict[str, Any]]:
        """Return the samples that a run wrote at its evaluations, as [{step, text}]; the last 50."""
        return [{"step": step, "text": text} for step, text in samples.read(folder, 50)]

    def _record(self, folder: Path) -> dict[str, Any]:
        try:
            return checked(record_in(folder / "run.toml"), "run.toml")
        except BardletError:
            return {}

    def _planned(self, folder: Path) -> int | None:
        """Return the number of steps of a run's plan."""
        try:
            settings = settings_in(folder / "run.toml")
        except BardletError:
            return None
        replans = settings.get("replans")
        return int(replans[-1][1]) if replans else settings.get("steps")

    # ---------------------------------------------------------------- deleting

    def delete(self, name: str) -> str:
        """Move a run to the trash; return its name there, for `restore`. Refuse one that is in use."""
        folder = summaries.check_deletable(self.folder(name))
        kept = f"{int(time.time())}~{quote(name, safe='')}"
        self.trash.mkdir(parents=True, exist_ok=True)
        os.replace(folder, self.trash / kept)
        self._summaries.pop(folder, None)
        self._curves.pop(folder, None)
        return kept

    def restore(self, kept: str) -> str:
        """Bring a deleted run back, and return its name."""
        if kept not in self.deleted():
            raise Refusal(404, "There is no such deleted run.", code="run_not_found")
        name = unquote(kept.partition("~")[2])
        target = self.root / name
        if os.path.lexists(target):
            raise Refusal(409, f"There is a new run of the name {name}; delete that one first.", code="name_taken")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.trash / kept, target)
        return name

    def deleted(self) -> list[str]:
        """Return the deleted runs that can be brought back, the newest first."""
        try:
            names = [name for name in os.listdir(self.trash) if name.partition("~")[0].isdecimal()]
        except OSError:
            return []
        return sorted(names, key=lambda name: -int(name.partition("~")[0]))

    def empty_trash(self) -> None:
        """Delete for good what was deleted long ago."""
        for name in self.deleted():
            if int(name.partition("~")[0]) < time.time() - KEPT_SECONDS:
                shutil.rmtree(self.trash / name, ignore_errors=True)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            inside = [Path(entry.path) for entry in entries
                      if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for path in inside:
        if (path / "run.toml").is_file():
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def _stamp(folder: Path) -> tuple[Any, ...]:
    """Return a value that changes when a run's summary does."""
    stamps: list[Any] = []
    for name in ("run.toml", "metrics.jsonl", "model.safetensors", ".lock"):
        status = None
        with suppress(OSError):
            status = (folder / name).stat()
        stamps.append(status and (status.st_mtime_ns, status.st_size))
    return tuple(stamps)
