"""The directive that puts a live part on a page, and the scripts and models that such pages load.

The models are the reader's own: the finished rungs of `runs/ladder-tinyshakespeare`, or of the folder in the
environment variable BARDLET_LADDER (empty: none). Rungs 1 to 7 that are not there come from docs/models/ (see
live_models.py). A page opened from the disk can load scripts, but neither fetch files nor import modules. So each
model is a script.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import live_models
from course import ROOT, Course, link, one_rung

from bardlet.errors import BardletError
from bardlet.export import html
from bardlet.ladder.rungs import LADDER, Rung
from bardlet.run import hf

KINDS = ("attention", "lens", "compare", "temperature")
MODULES = ("forward.js", "tokenizer.js", "weights.js", "answer.js", "views.js", "lesson.js")
"""The modules of a live part, each after those that it imports."""
SENTENCE = "To be, or not to be, that is the question"
ELEMENT = re.compile(r'<div class="live" data-live="[a-z ]+" data-rungs="([a-z -]+)"')


def own_ladder() -> Path | None:
    """Return the folder of the reader's ladder; None if there is none."""
    named = os.environ.get("BARDLET_LADDER")
    folder = Path(named) if named else ROOT / "runs" / "ladder-tinyshakespeare"
    if named and not folder.is_dir():
        raise BardletError(f"BARDLET_LADDER={named}: no such folder; name the folder of a bardlet ladder")
    return folder if named != "" and folder.is_dir() else None


def own_run(rung: Rung) -> Path | None:
    """Return the reader's run of a rung; None if there is none."""
    ladder = own_ladder()
    return live_models.run_of(ladder, rung) if ladder else None


def available() -> list[Rung]:
    """Return the rungs that have a model."""
    return [rung for rung in LADDER if not rung.scaled or own_run(rung)]


def live(course: Course, argument: str, page: str) -> str:
    """Show a live part: `rung 3 | attention`, `rung 6 | attention lens`, `rung 7 | temperature`, `all | compare`.

    A rung whose model only the reader can train is named instead.
    """
    which, _, kind = (part.strip() for part in argument.partition("|"))
    if not kind or any(word not in KINDS for word in kind.split()):
        raise BardletError(f"choose what the live part shows, after a |, from {', '.join(KINDS)}")
    selected = available() if which == "all" else [one_rung(which)]
    if not all(rung in available() for rung in selected):
        number = selected[0].number
        return (f"*This part comes alive with a model of yours: train it (`bardlet ladder --rungs {number}`), then "
                "build these pages again (`make docs`).*")
    names = " ".join(rung.name for rung in selected)
    return (f'<div class="live" data-live="{kind}" data-rungs="{names}" data-sentence="{escape(SENTENCE)}">\n'
            "<p>This part runs a model in your browser, for which it needs JavaScript.</p>\n</div>")


def origin(rung: Rung) -> str:
    """Return a sentence on the origin of a rung's model."""
    run = own_run(rung)
    if run is not None:
        facts = live_models.outcome(run)
        trained = f", trained on {facts['date']}" if facts["date"] else ""
        return f"This is your own rung {rung.number}{trained}; validation loss {facts['val_loss']:.3f} nats per token."
    facts = live_models.facts()["rungs"][rung.name]
    return (f"Rung {rung.number} as it comes with the course, trained on {facts['date']}; validation loss "
            f"{facts['val_loss_stored']:.3f} nats per character. Climb the ladder, build these pages again with make "
            "docs, and your own model takes its place.")


def origins(rungs: list[Rung]) -> str:
    """Return a sentence on the origin of the models of a comparison."""
    own = [str(rung.number) for rung in rungs if own_run(rung)]
    if not own:
        return ("These rungs come with the course. Climb the ladder, build these pages again with make docs, and your "
                "own models take their places.")
    dates = sorted({live_models.outcome(run)["date"] for rung in rungs if (run := own_run(rung))} - {""})
    return (f"Your own models: rungs {', '.join(own)}" + (f", trained on {' and '.join(dates)}" if dates else "")
            + (". The others come with the course." if len(own) < len(rungs) else "."))


def model_script(rung: Rung) -> str:
    """Return the script that adds a rung's model to `bardletModels`."""
    run = own_run(rung)
    model, tokenizer = hf.read_folder(run) if run else live_models.read(rung)
    about = {"name": f"{rung.number}. {rung.title}", "origin": origin(rung), "together": origins(available())}
    return (f"(globalThis.bardletModels ??= {{}})[{html.in_script(rung.name)}] = "
            f"{html.in_script(html.in_parts(model, tokenizer, about))};\n")


def lesson_script() -> str:
    """Return the script that brings live parts to life."""
    return f'(() => {{\n"use strict";\n{html.scripts(MODULES)}\n}})();\n'


def site_files() -> Iterator[tuple[str, str]]:
    """Yield (address, contents) of every file that live parts load."""
    yield "live/lesson.js", lesson_script()
    for rung in available():
        yield f"live/{rung.name}.js", model_script(rung)


def with_scripts(content: str, page: str) -> str:
    """Return the HTML of a page with the scripts that its live parts need, each once."""
    names = dict.fromkeys(name for rungs in ELEMENT.findall(content) for name in rungs.split())
    if not names:
        return content
    addresses = (link(page, f"live/{name}.js") for name in [*names, "lesson"])
    return content + "".join(f'\n<script src="{address}"></script>' for address in addresses)
