"""The code of a rung, found in the sources themselves, and set beside the code of the rung before."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from bardlet.ladder import rungs
from bardlet.ladder.rungs import Rung

MODEL_FILES = ("models/lecture.py", "models/layers.py", "ops/attention.py", "ops/dropout.py")
"""Where a part is looked for whose name says no file."""
ALIKE = 0.5
"""The share of words that two lines have in common when one is shown as the other's new form."""
RELATED = 0.2
"""The share of the shorter code's lines that both must have for the two to be worth comparing."""


class Row(NamedTuple):
    """A line of a comparison: both sides, or None where a side has no such line."""

    kind: str
    """same, changed, removed (left only) or added (right only)."""
    left_number: int | None
    left: str | None
    right_number: int | None
    right: str | None


# ---------------------------------------------------------------------------- finding


class Part(NamedTuple):
    """A class, a function or a constant at the top of a file."""

    name: str
    file: str
    """Below src/bardlet."""
    line: int
    """Its first line, from 1; decorators belong to it."""
    code: str


def definitions(text: str) -> dict[str, tuple[int, str]]:
    """(first line, code) of every class, function and constant at the top of a Python file, by name."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.append(node.name)
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found.update(dict.fromkeys(names, (first, "\n".join(lines[first - 1 : node.end_lineno]))))
    return found


@cache
def _definitions(file: str) -> dict[str, tuple[int, str]]:
    """What `file`, below src/bardlet, defines."""
    return definitions(resources.files("bardlet").joinpath(file).read_text(encoding="utf-8"))


def part(name: str) -> Part:
    """One part of a rung: a name in models/lecture.py or models/layers.py, or "file.py:name" below src/bardlet.

    Raises LookupError where there is no such class, function or constant.
    """
    file, colon, bare = name.rpartition(":")
    for place in (file,) if colon else MODEL_FILES:
        if bare in (found := _definitions(place)):
            return Part(bare, place, *found[bare])
    raise LookupError(f"{name}: no class or function of this name in {file or ' or '.join(MODEL_FILES)}")


def source(rung: Rung) -> str:
    """The code of all parts of a rung in their order, two empty lines between them. Raises LookupError."""
    return "\n\n\n".join(part(name).code for name in rung.parts)


def before(rung: Rung) -> Rung | None:
    """The rung whose code to compare with, trained or not: see `rungs.before`.

    None for the first, and where the code before is about something else (rungs 12 and 13 are trained in another way:
    no line of a model changes).
    """
    earlier = rungs.before(rung)
    if earlier is None:
        return None
    old, new = source_before(earlier, rung), source(rung)
    kept = sum(row.kind == "same" and bool(row.right and row.right.strip()) for row in beside(old, new))
    shorter = min(sum(bool(line.strip()) for line in code.split("\n")) for code in (old, new))
    return earlier if kept >= RELATED * shorter else None


def source_before(earlier: Rung, rung: Rung) -> str:
    """The code of `earlier` to compare `rung` with: without parts that `rung` still uses but does not show again.

    Beside a rung that leaves out a helper explained one rung before, the helper would look removed.
    """
    used = {node.id for node in ast.walk(ast.parse(source(rung))) if isinstance(node, ast.Name)}
    still = {name for name in earlier.parts if name in used and name not in rung.parts}
    return "\n\n\n".join(part(name).code for name in earlier.parts if name not in still)


def settings(rung: Rung) -> dict[str, Any]:
    """What a rung trains with, by name: the sizes (of a scaled rung those on a CPU), the lecture's way, its own."""
    return {**(rungs.CPU if rung.scaled else rungs.SMALL), **rungs.LECTURE, **rung.settings}


def written(settings: Mapping[str, Any]) -> list[str]:
    """Settings as code, a line each."""
    return [f"{name} = {value!r}" for name, value in settings.items()]


def retrained(rung: Rung) -> Rung | None:
    """The rung before, where both are one model and only settings differ (rungs 12 and 13); else None."""
    earlier = rungs.before(rung)
    return earlier if earlier is not None and earlier.model == rung.model else None


def settings_beside(earlier: Rung, rung: Rung) -> tuple[str, str]:
    """(old, new): the settings of two rungs that are trained alike but for some, without the sizes that they share.

    The sizes depend on the machine, and a rung that changes one of them is shown with it.
    """
    chosen = {**rungs.LECTURE, **earlier.settings, **rung.settings}
    old, new = ({name: known[name] for name in chosen if name in known} for known in map(settings, (earlier, rung)))
    return "\n".join(written(old)), "\n".join(written(new))

# ---------------------------------------------------------------------------- comparing


def beside(before: str, after: str) -> list[Row]:
    """Two sources line by line: what is the same, and what was changed, removed or added between.

    The left sides in their order are the lines of `before`, the right ones those of `after`. Between equal lines, a
    line is paired with the one that has most words in common with it, in order, and one line with one line.
    """
    left, right = (before.split("\n") if before else []), (after.split("\n") if after else [])
    rows: list[Row] = []
    for operation, i, i_end, j, j_end in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if operation == "equal":
            rows += (Row("same", i + k + 1, left[i + k], j + k + 1, right[j + k]) for k in range(i_end - i))
            continue
        for a, b in _pairs(left[i:i_end], right[j:j_end]):
            old = (None, None) if a is None else (i + a + 1, left[i + a])
            new = (None, None) if b is None else (j + b + 1, right[j + b])
            kind = "added" if a is None else "removed" if b is None else "changed"
            rows.append(Row(kind, *old, *new))
    return list(_joined(rows))


def _joined(rows: Sequence[Row]) -> Iterator[Row]:
    """One line removed and one added in its place (another docstring, say) become one row."""
    kinds = ["", *(row.kind for row in rows), "", ""]  # kinds[k + 1] is that of row k
    skip = False
    for k, row in enumerate(rows):
        if skip:
            skip = False
        elif kinds[k + 1] == "removed" != kinds[k] and kinds[k + 2] == "added" != kinds[k + 3]:
            skip = True
            yield Row("changed", row.left_number, row.left, rows[k + 1].right_number, rows[k + 1].right)
        else:
            yield row


def _pairs(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
    """Indices of lines that belong together, in order: the alignment with the greatest sum of likeness."""
    likeness = [[_likeness(a, b) for b in right] for a in left]
    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]  # best[i][j]: of what follows i and j
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            paired = likeness[i][j] + best[i + 1][j + 1] if likeness[i][j] >= ALIKE else 0.0
            best[i][j] = max(paired, best[i + 1][j], best[i][j + 1])
    i = j = 0
    while i < len(left) and j < len(right):
        if likeness[i][j] >= ALIKE and best[i][j] == likeness[i][j] + best[i + 1][j + 1]:
            yield i, j
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            yield i, None
            i += 1
        else:
            yield None, j
            j += 1
    yield from ((k, None) for k in range(i, len(left)))
    yield from ((None, k) for k in range(j, len(right)))


def _likeness(a: str, b: str) -> float:
    """The share of words of two lines that both have, from 0 to 1; the parts of CamelCase count as words."""
    one, other = (re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", line) for line in (a, b))
    common = sum(min(one.count(word), other.count(word)) for word in set(one))
    return 2 * common / (len(one) + len(other)) if one and other else 0.0


# ---------------------------------------------------------------------------- showing


def highlighted(source: str) -> list[str]:
    """Python code as HTML, one string a line, without the line breaks: safe text in spans with Pygments' classes.

    A span never goes beyond its line: a docstring of three lines is three spans.
    """
    from pygments import highlight
    from pygments.formatters.html import HtmlFormatter
    from pygments.lexers.python import PythonLexer

    html = highlight(source, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    lines = html.split("\n")
    return lines[: len(source.split("\n"))]  # the formatter ends every line, the last one too
