"""The lessons of the studio's tab Learn: a page of the course for each rung, its code, and the reader's own run of it.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from bardlet.ladder import rungs, sources
from bardlet.ladder.exercises.table import EXERCISES
from bardlet.ladder.rungs import LADDER, Rung
from bardlet.server.errors import Refusal

RUN = re.compile(r"(?:.*/)?(\d\d)-([a-z][a-z-]*)/seed-\d+")
"""The name of a run of a ladder, see `ladder/run.py`."""
TEXT = "tinyshakespeare"
"""The text on which the lecture's losses and the normal bands were measured."""
FOLDER = "exercises"
"""The folder to which the lesson's commands copy the starter files."""
SECTIONS = ("What", "Why", "Exercise")


def overview(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each rung: what it adds, the lecture's loss, the normal band, and the reader's newest run of it.

    runs: rows of the table of runs, the newest first.
    """
    newest: dict[int, dict[str, Any]] = {}
    for run in runs:
        match = RUN.fullmatch(run["name"])
        if match and run["state"] == "finished":
            newest.setdefault(int(match[1]), run)
    return [_row(rung, newest.get(rung.number)) for rung in LADDER]


def _row(rung: Rung, run: dict[str, Any] | None) -> dict[str, Any]:
    comparable = run is None or run["text"] == TEXT
    band = rungs.bands().get(rung.name) if comparable and not rung.scaled else None
    loss = None if run is None else run["val_loss"]
    verdict = rungs.place(loss, band) if band and loss is not None else ""
    return {"number": rung.number, "name": rung.name, "title": rung.title, "adds": rung.adds, "lecture": rung.lecture,
            "band": [band["low"], band["high"]] if band else None, "attends": rung.attends,
            "run": None if run is None else run["name"], "loss": loss, "verdict": verdict}


def lesson(number: int) -> dict[str, Any]:
    """Return the text and the code of a rung's lesson. Refuse a number that no rung has."""
    rung = next((rung for rung in LADDER if rung.number == number), None)
    if rung is None:
        raise Refusal(404, f"There is no rung {number}; there are {len(LADDER)}.", code="rung_not_found")
    file = f"{FOLDER}/{next(each.file for each in EXERCISES if each.rung == number and each.name == rung.name)}"
    return {"number": rung.number, "title": rung.title,
            "commands": [f"bardlet check --start {FOLDER}", f"bardlet check {file}"], "code": sources.source(rung),
            "settings": "\n".join(sources.as_assignments(sources.settings(rung))), **_sections(rung)}


def _sections(rung: Rung) -> dict[str, str]:
    """Return the sections of a rung's page as Markdown, without what only the built course can show."""
    text = page(rung).read_text(encoding="utf-8")
    parts = {title.strip(): body for title, body in
             (part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])}
    return {title.lower(): plain(parts.get(title, "")) for title in SECTIONS}


def page(rung: Rung) -> Traversable:
    """Return the course's page of a rung: in a wheel beside the ladder's code, in a clone in docs/."""
    name = f"{rung.number:02}-{rung.name}.md"
    packed = resources.files("bardlet") / "ladder" / "pages" / name
    return packed if packed.is_file() else Path(__file__).parents[3] / "docs" / "rungs" / name


def plain(markdown: str) -> str:
    """Return Markdown without directives, links and folded answers."""
    body = re.split(r"^(?:\?\?\? |Next: )", markdown, maxsplit=1, flags=re.MULTILINE)[0]
    body = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", body)
    paragraphs = (part for part in body.split("\n\n") if "{{" not in part)
    return "\n\n".join(paragraphs).strip()
