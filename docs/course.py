"""The data behind the directives, and the directives that show code and experiments; `directives.py` lists them."""

from __future__ import annotations

import difflib
import json
import os
import posixpath
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError
from bardlet.ladder import rungs, sources
from bardlet.ladder.rungs import Rung

ROOT = Path(__file__).parents[1]
PENDING = "*not measured yet*"


class Missing(Exception):
    """A result that a run must write first; a draft builds without it."""


@dataclass
class Course:
    """The data behind the directives. `folder` receives the pictures of experiments; None: do not run experiments."""

    docs: Path
    measured: dict[str, Any]
    answers: dict[str, Any]
    draft: bool = False
    folder: Path | None = None
    results: dict[str, Any] = field(default_factory=dict)
    """The result of each experiment, which runs only once."""

    @classmethod
    def load(cls, docs: Path, folder: Path | None = None) -> Course:
        """Load the results in the folder `docs`."""
        draft = os.environ.get("BARDLET_DOCS_DRAFT") == "1"
        return cls(docs, _json(docs / "measured.json"), _json(docs / "answers.json"), draft, folder)

    def of(self, rung: Rung) -> dict[str, Any]:
        """Return the measurements of a rung. Raises Missing."""
        figures = self.measured.get("rungs", {}).get(rung.name)
        if figures is None:
            raise Missing(f"docs/measured.json has no rung '{rung.name}': run python benchmarks/ladder.py publish")
        return dict(figures)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ---------------------------------------------------------------------------- building blocks of pages


def link(page: str, target: str) -> str:
    """Return the address of docs/`target` relative to docs/`page`."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def one_rung(argument: str) -> Rung:
    """Return the rung named by "rung 3" or "rung one-head". Raises BardletError."""
    word, _, name = argument.partition(" ")
    selected = rungs.select(name) if word == "rung" and name else ()
    if len(selected) != 1:
        raise BardletError("name one rung, as in: rung 3")
    return selected[0]


def fence(language: str, text: str, title: str = "", highlighted: str = "") -> str:
    """Return a code block, fenced by tildes, since a docstring may contain backticks.

    highlighted: text whose lines are highlighted; the block needs a title.
    """
    numbers = [str(n) for n, line in enumerate(text.splitlines(), start=1) if highlighted and highlighted in line]
    marks = f' hl_lines="{" ".join(numbers)}"' if numbers else ""
    head = f'~~~ {{ .{language} title="{title}"{marks} }}' if title else f"~~~ {language}"
    return f"{head}\n{text.rstrip()}\n~~~"


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def picture(page: str, stem: str, shows: str) -> str:
    """Return a light and a dark picture; the page shows the one that fits its theme."""
    return "\n".join(f"![{shows}]({link(page, stem + suffix)}.png#only-{theme})"
                     for suffix, theme in (("", "light"), ("-dark", "dark")))


# ---------------------------------------------------------------------------- code


def _file(argument: str) -> tuple[Path, str]:
    """Split an argument into (file, name).

    It looks like "bardlet.training.losses.dpo_loss", "docs/answers.py:train" or "docs/exercises/addition.py".
    """
    if "/" in argument:
        file, _, name = argument.partition(":")
        path = ROOT / file
    else:
        module, _, name = argument.rpartition(".")
        path = ROOT / "src" / (module.replace(".", "/") + ".py")
    if not path.is_file():
        raise BardletError(f"there is no file {path.relative_to(ROOT).as_posix()}")
    return path, name


def source(course: Course, argument: str, page: str) -> str:
    """Show the source of a function or class, or of a whole file, under its file name and line number.

    `NAME | TEXT` highlights the lines that contain TEXT. Raises BardletError if there are none.
    """
    argument, _, highlighted = (part.strip() for part in argument.partition("|"))
    path, name = _file(argument)
    line, text = 1, path.read_text(encoding="utf-8")
    if name:
        defined = sources.definitions(text)
        if name not in defined:
            raise BardletError(f"{path.name} defines no '{name}'")
        line, text = defined[name]
    file = path.relative_to(ROOT).as_posix()
    if highlighted not in text:
        raise BardletError(f"{argument} has no line with '{highlighted}'")
    return fence("python", text, f"{file}, line {line}" if name else file, highlighted)


def code(course: Course, argument: str, page: str) -> str:
    """Show the parts that a rung adds to the rung before, in full. `rung 3 | Head` folds all parts but Head."""
    argument, _, chosen = (part.strip() for part in argument.partition("|"))
    rung = one_rung(argument)
    before = rungs.predecessor(rung)
    new = [sources.part(part) for part in rung.parts if before is None or part not in before.parts]
    return _some({part.name: fence("python", part.code, f"src/bardlet/{part.file}, line {part.line}") for part in new},
                 chosen, "The rest of the new code")


def _some(listings: dict[str, str], chosen: str, title: str) -> str:
    """Return listings by name, one below the other; if some are chosen, the others are folded below them."""
    names = chosen.split() or list(listings)
    if wrong := [name for name in names if name not in listings]:
        raise BardletError(f"no listing '{wrong[0]}'; choose from {', '.join(listings)}")
    others = [text for name, text in listings.items() if name not in names]
    return "\n\n".join([*(listings[name] for name in names), *([folded(title, "\n\n".join(others))] if others else [])])


def changes(course: Course, argument: str, page: str) -> str:
    """Show a rung as a diff against the rung before: of the code or, if the model is the same, of the settings.

    A class is compared with the class of the same kind in the rung before, attention with attention: their names end in
    the same word. A class without a counterpart is new, and not shown. `rung 6 | ResidualModel` folds the others.
    """
    argument, _, chosen = (part.strip() for part in argument.partition("|"))
    rung = one_rung(argument)
    before = rungs.predecessor(rung)
    if before is None:
        raise BardletError("the first rung has no rung before it")
    if sources.same_model_predecessor(rung):
        return _diff(f"settings, compared with rung {before.number}",
                     *(text.splitlines() for text in sources.settings_to_compare(before, rung)))
    old = {name: sources.part(name).code.splitlines() for name in before.parts if name not in rung.parts}
    new = {name: sources.part(name).code.splitlines() for name in rung.parts if name not in before.parts}
    pairs = [(a, b) for b in new for a in old if _kind(a) == _kind(b)]
    if not pairs:
        raise BardletError(f"no class of rung {rung.number} has a counterpart in rung {before.number}")
    diffs = {b: _diff(f"{b}, compared with {a} of rung {before.number}", old[a], new[b]) for a, b in pairs}
    return _some(diffs, chosen, "The other changes")


def translated(course: Course, name: str, page: str) -> str:
    """Show an entry of docs/translation.json. Raises Missing."""
    entry = _json(course.docs / "translation.json").get(name)
    if not entry:
        raise Missing(f"docs/translation.json has no '{name}': run python benchmarks/translation.py publish DIR")
    return str(entry)


def result(course: Course, argument: str, page: str) -> str:
    """Show `FILE NAME KEY=VALUE ...`: the mean of NAME in benchmarks/results/FILE.jsonl, over lines with these values.

    Only the newest line of each seed counts. If the seeds differ, the standard deviation follows. NAME% gives a
    percentage. Raises Missing.
    """
    file, name, *conditions = argument.split()
    path, name, percent = ROOT / "benchmarks" / "results" / f"{file}.jsonl", name.removesuffix("%"), name.endswith("%")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    wanted = [condition.split("=") for condition in conditions]
    matching = {line.get("seed"): line for line in lines
                if name in line and all(str(line.get(key)) == value for key, value in wanted)}
    values = [float(line[name]) * (100 if percent else 1) for line in matching.values()]
    if not values:
        raise Missing(f"benchmarks/results/{file}.jsonl has no {name} with {' '.join(conditions) or 'any values'}")
    same = len(set(values)) == 1
    digits = 1 if percent or statistics.mean(values) >= 10 else 2
    if same and not percent and values[0].is_integer():
        digits = 0
    text = f"{statistics.mean(values):,.{digits}f}"
    if not same:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return f"{text} %" if percent else text


def _kind(name: str) -> str:
    """Return the last word of a name: Attention, Forward, Block (also of SwiGLUBlock), Model."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)[-1]


def _diff(title: str, old: list[str], new: list[str]) -> str:
    """Return removed and added lines with two lines of context; "..." stands for equal lines that are left out."""
    rows, end = [], 0
    for group in difflib.SequenceMatcher(None, old, new).get_grouped_opcodes(2):
        if group[0][1] > end:
            rows.append(" ...")
        for tag, i, end, j, k in group:
            rows += [" " + line for line in old[i:end]] if tag == "equal" else [
                *("-" + line for line in old[i:end]), *("+" + line for line in new[j:k])]
    return fence("diff", "\n".join([*rows, " ..."] if end < len(old) else rows), title)


def whole(course: Course, argument: str, page: str) -> str:
    """Show all of a rung's code, folded."""
    rung = one_rung(argument)
    return folded(f"All of rung {rung.number}", fence("python", sources.source(rung)))


def folded(title: str, inside: str) -> str:
    """Return a folded block that a reader can open."""
    return f'??? note "{title}"\n\n' + "\n".join("    " + line if line else line for line in inside.split("\n"))


def setting(course: Course, argument: str, page: str) -> str:
    """Show a size of the rungs: "small n_embd", or "scaled n_embd" for the larger rungs on a CPU."""
    kind, _, name = argument.partition(" ")
    sizes = {"small": rungs.SMALL, "scaled": rungs.CPU}.get(kind, {})
    if name not in sizes:
        raise BardletError("name a size, as in: scaled n_embd")
    return f"{sizes[name]:,}"


# ---------------------------------------------------------------------------- experiments


def experiment(course: Course, argument: str, page: str) -> str:
    """Run an experiment of bardlet.ladder.experiments and show its question, results, picture and code."""
    from bardlet.ladder import experiments

    run = experiments.EXPERIMENTS.get(argument)
    if run is None:
        raise BardletError(f"unknown experiment; choose from {', '.join(experiments.EXPERIMENTS)}")
    if course.folder is None:
        return PENDING
    if argument not in course.results:
        course.results[argument] = run()
        experiments.pictures(course.folder, [course.results[argument]])
    result = course.results[argument]
    blocks = [f"*{result.question}*", "\n".join("- " + re.sub(r"([*_<])", r"\\\1", line) for line in result.lines)]
    if (course.folder / f"{argument}.png").exists():
        blocks.append(picture(page, f"experiments/{argument}", result.title))
    code = source(course, f"{run.__module__}.{run.__name__}", page)
    return "\n\n".join([*blocks, folded("The code of this experiment", code)])


def command_help(course: Course, name: str, page: str) -> str:
    """Return the `--help-all` of a command as a code block, 96 columns wide."""
    from unittest import mock

    from bardlet.cli.completion import command_parser

    with mock.patch.dict("os.environ", COLUMNS="97"):
        return f"```text\n{command_parser(name).format_help().strip()}\n```"
