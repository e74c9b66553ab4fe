"""What directives draw on, and those that show code and experiments. `directives.py` says which there are."""

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
    """Something that a run has to write first; a draft may go without."""


@dataclass
class Course:
    """All that directives draw on. `folder` is where pictures of experiments go; None: experiments are not run."""

    docs: Path
    measured: dict[str, Any]
    answers: dict[str, Any]
    draft: bool = False
    folder: Path | None = None
    results: dict[str, Any] = field(default_factory=dict)
    """What each experiment gave: they run once."""

    @classmethod
    def load(cls, docs: Path, folder: Path | None = None) -> Course:
        """The course in `docs`, with what has been measured there."""
        draft = os.environ.get("BARDLET_DOCS_DRAFT") == "1"
        return cls(docs, _json(docs / "measured.json"), _json(docs / "answers.json"), draft, folder)

    def of(self, rung: Rung) -> dict[str, Any]:
        """What was measured of a rung. Raises Missing."""
        found = self.measured.get("rungs", {}).get(rung.name)
        if found is None:
            raise Missing(f"docs/measured.json has no rung '{rung.name}': run python benchmarks/ladder.py publish")
        return dict(found)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ---------------------------------------------------------------------------- what pages are made of


def link(page: str, target: str) -> str:
    """The address of docs/`target` as docs/`page` writes it."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def one_rung(argument: str) -> Rung:
    """The rung of "rung 3" or "rung one-head". Raises BardletError."""
    word, _, which = argument.partition(" ")
    found = rungs.select(which) if word == "rung" and which else ()
    if len(found) != 1:
        raise BardletError("say which, as in: rung 3")
    return found[0]


def fence(language: str, text: str, title: str = "") -> str:
    """A block of code. Tildes, since a docstring may hold backticks."""
    head = f'~~~ {{ .{language} title="{title}" }}' if title else f"~~~ {language}"
    return f"{head}\n{text.rstrip()}\n~~~"


def table_of(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def picture(page: str, stem: str, shows: str) -> str:
    """A light and a dark picture, of which the page shows one."""
    return "\n".join(f"![{shows}]({link(page, stem + suffix)}.png#only-{theme})"
                     for suffix, theme in (("", "light"), ("-dark", "dark")))


# ---------------------------------------------------------------------------- code


def _file(where: str) -> tuple[Path, str]:
    """(file, name) of "bardlet.training.losses.next_token", "docs/answers.py:train" or "docs/exercises/addition.py"."""
    if "/" in where:
        place, _, name = where.partition(":")
        path = ROOT / place
    else:
        module, _, name = where.rpartition(".")
        path = ROOT / "src" / (module.replace(".", "/") + ".py")
    if not path.is_file():
        raise BardletError(f"there is no file {path.relative_to(ROOT).as_posix()}")
    return path, name


def source(course: Course, where: str, page: str) -> str:
    """The source of a function or class, or of a whole file, and where it stands."""
    path, name = _file(where)
    line, text = 1, path.read_text(encoding="utf-8")
    if name:
        defined = sources.definitions(text)
        if name not in defined:
            raise BardletError(f"{path.name} defines no '{name}'")
        line, text = defined[name]
    where = path.relative_to(ROOT).as_posix()
    return fence("python", text, f"{where}, line {line}" if name else where)


def code(course: Course, argument: str, page: str) -> str:
    """The parts of a rung that the rung before does not have, in full."""
    rung = one_rung(argument)
    before = rungs.before(rung)
    new = [part for part in rung.parts if before is None or part not in before.parts]
    return "\n\n".join(fence("python", part.code, f"src/bardlet/{part.file}, line {part.line}")
                       for part in map(sources.part, new))


def changes(course: Course, argument: str, page: str) -> str:
    """What a rung changes in the code of the rung before it or, where the model is the same, in its settings.

    A class is set beside the one of the same kind in the rung before, attention beside attention: names end in the same
    word. One that has no such partner is new, and not here.
    """
    rung = one_rung(argument)
    before = rungs.before(rung)
    if before is None:
        raise BardletError("nothing stands before the first rung")
    if sources.retrained(rung):
        return _diff(f"settings, beside rung {before.number}",
                     *(text.splitlines() for text in sources.settings_beside(before, rung)))
    old = {name: sources.part(name).code.splitlines() for name in before.parts if name not in rung.parts}
    new = {name: sources.part(name).code.splitlines() for name in rung.parts if name not in before.parts}
    return "\n\n".join(_diff(f"{b}, beside {a} of rung {before.number}", old[a], new[b])
                       for b in new for a in old if _kind(a) == _kind(b))


def beside(course: Course, argument: str, page: str) -> str:
    """What changes from one function or class to another, as in `bardlet.models.encdec.Block ....CrossBlock`."""
    names = argument.split()
    if len(names) != 2:
        raise BardletError("name two functions or classes")
    (old, a), (new, b) = (_file(name) for name in names)
    texts = []
    for path, name in ((old, a), (new, b)):
        defined = sources.definitions(path.read_text(encoding="utf-8"))
        if name not in defined:
            raise BardletError(f"{path.name} defines no '{name}'")
        texts.append(defined[name][1].splitlines())
    return _diff(f"{b}, beside {a}", *texts)


def translated(course: Course, name: str, page: str) -> str:
    """A table of docs/translation.json. Raises Missing."""
    found = _json(course.docs / "translation.json").get(name)
    if not found:
        raise Missing(f"docs/translation.json has no '{name}': run python benchmarks/translation.py publish DIR")
    return str(found)


def result(course: Course, argument: str, page: str) -> str:
    """FILE NAME KEY=VALUE ...: the mean of a figure over the newest line of each seed in benchmarks/results/FILE.jsonl,
    of those with these values, and its deviation where there are several; NAME% as a percentage. Raises Missing."""
    file, name, *wanted = argument.split()
    path, name, percent = ROOT / "benchmarks" / "results" / f"{file}.jsonl", name.removesuffix("%"), name.endswith("%")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    fitting = {line.get("seed"): line for line in lines
               if name in line and all(str(line.get(key)) == value for key, value in (w.split("=") for w in wanted))}
    values = [float(line[name]) * (100 if percent else 1) for line in fitting.values()]
    if not values:
        raise Missing(f"benchmarks/results/{file}.jsonl has no {name} with {' '.join(wanted) or 'any values'}")
    digits = 1 if percent or statistics.mean(values) >= 10 else 2
    said = f"{statistics.mean(values):,.{digits}f}"
    if len(values) > 1:
        said += f" ± {statistics.stdev(values):.{digits}f}"
    return f"{said} %" if percent else said


def _kind(name: str) -> str:
    """The last word of a name: Attention, Forward, Block, Model."""
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)[-1]


def _diff(title: str, old: list[str], new: list[str]) -> str:
    """Removed and added lines, with a little of what stands around them."""
    lines = list(difflib.unified_diff(old, new, n=2, lineterm=""))[2:]
    return fence("diff", "\n".join("" if line.startswith("@@") else line for line in lines).strip("\n"), title)


def whole(course: Course, argument: str, page: str) -> str:
    """All of a rung's code, folded."""
    rung = one_rung(argument)
    return folded(f"All of rung {rung.number}", fence("python", sources.source(rung)))


def folded(title: str, inside: str) -> str:
    """Something that a reader may open."""
    return f'??? note "{title}"\n\n' + "\n".join("    " + line if line else line for line in inside.split("\n"))


def setting(course: Course, argument: str, page: str) -> str:
    """A size of the rungs: "small n_embd", or "scaled n_embd" for the larger ones on a CPU."""
    kind, _, name = argument.partition(" ")
    sizes = {"small": rungs.SMALL, "scaled": rungs.CPU}.get(kind, {})
    if name not in sizes:
        raise BardletError("say which, as in: scaled n_embd")
    return f"{sizes[name]:,}"


# ---------------------------------------------------------------------------- experiments


def experiment(course: Course, argument: str, page: str) -> str:
    """An experiment of bardlet.ladder.experiments, run now: what it asks, what came out, its figure and its code."""
    from bardlet.ladder import experiments

    run = experiments.EXPERIMENTS.get(argument)
    if run is None:
        raise BardletError(f"there is no such experiment; choose one of {', '.join(experiments.EXPERIMENTS)}")
    if course.folder is None:
        return PENDING
    if argument not in course.results:
        course.results[argument] = run()
        experiments.pictures(course.folder, [course.results[argument]])
    result = course.results[argument]
    found = [f"*{result.question}*", "\n".join("- " + re.sub(r"([*_<])", r"\\\1", line) for line in result.lines)]
    if (course.folder / f"{argument}.png").exists():
        found.append(picture(page, f"experiments/{argument}", result.title))
    code = source(course, f"{run.__module__}.{run.__name__}", page)
    return "\n\n".join([*found, folded("The code of this experiment", code)])
