"""Extract the code of a rung from bardlet's sources, and compare it with the rung before."""

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
"""The files searched for a part whose name gives no file."""
MIN_WORD_OVERLAP = 0.5
"""Two lines with at least this share of common words are shown as one changed line."""
MIN_LINE_OVERLAP = 0.2
"""Two rungs are compared if they share at least this fraction of the shorter code's lines."""


class Row(NamedTuple):
    """A row of a side-by-side comparison; None on a side without that line."""

    kind: str
    """same, changed, removed (left only) or added (right only)."""
    left_number: int | None
    left: str | None
    right_number: int | None
    right: str | None


# ---------------------------------------------------------------------------- parts


class Part(NamedTuple):
    """A top-level class, function or constant of a file."""

    name: str
    file: str
    """Relative to src/bardlet."""
    line: int
    """Its first line, from 1, including decorators."""
    code: str


def definitions(text: str) -> dict[str, tuple[int, str]]:
    """Return (first line, code) of every top-level class, function and constant of a Python file, by name."""
    lines, by_name = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.append(node.name)
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        by_name.update(dict.fromkeys(names, (first, "\n".join(lines[first - 1 : node.end_lineno]))))
    return by_name


@cache
def _definitions(file: str) -> dict[str, tuple[int, str]]:
    """Return the `definitions` of a file, given relative to src/bardlet."""
    return definitions(resources.files("bardlet").joinpath(file).read_text(encoding="utf-8"))


def part(name: str) -> Part:
    """Return a part of a rung by its name in one of MODEL_FILES, or by "file.py:name" relative to src/bardlet.

    Raises LookupError if there is no such class, function or constant.
    """
    file, colon, bare = name.rpartition(":")
    for path in (file,) if colon else MODEL_FILES:
        if bare in (defined := _definitions(path)):
            return Part(bare, path, *defined[bare])
    raise LookupError(f"{name}: no such class, function or constant in {file or ' or '.join(MODEL_FILES)}")


def source(rung: Rung) -> str:
    """Return the code of all parts of a rung in order, separated by two empty lines. Raises LookupError."""
    return "\n\n\n".join(part(name).code for name in rung.parts)


def rung_to_compare(rung: Rung) -> Rung | None:
    """Return the rung whose code to compare with, trained or not: its predecessor, if their code is related.

    None for the first rung, and for rungs 12 and 13, which change only the training and no line of a model.
    """
    earlier = rungs.predecessor(rung)
    if earlier is None:
        return None
    old, new = source_to_compare(earlier, rung), source(rung)
    unchanged = sum(row.kind == "same" and bool(row.right and row.right.strip()) for row in side_by_side(old, new))
    shorter = min(sum(bool(line.strip()) for line in code.split("\n")) for code in (old, new))
    return earlier if unchanged >= MIN_LINE_OVERLAP * shorter else None


def source_to_compare(earlier: Rung, rung: Rung) -> str:
    """Return the code of `earlier` without the parts that `rung` still uses but does not show again.

    Otherwise a helper that was explained one rung before would look removed.
    """
    used = {node.id for node in ast.walk(ast.parse(source(rung))) if isinstance(node, ast.Name)}
    hidden = {name for name in earlier.parts if name in used and name not in rung.parts}
    return "\n\n\n".join(part(name).code for name in earlier.parts if name not in hidden)


def settings(rung: Rung) -> dict[str, Any]:
    """Return the settings of a rung, by name: sizes (on a CPU if scaled), the lecture's settings, then its own."""
    return {**(rungs.CPU if rung.scaled else rungs.SMALL), **rungs.LECTURE, **rung.settings}


def as_assignments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as Python assignments, one per line."""
    return [f"{name} = {value!r}" for name, value in settings.items()]


def same_model_predecessor(rung: Rung) -> Rung | None:
    """Return the rung before if it has the same model and only settings differ (rungs 12 and 13); else None."""
    earlier = rungs.predecessor(rung)
    return earlier if earlier is not None and earlier.model == rung.model else None


def settings_to_compare(earlier: Rung, rung: Rung) -> tuple[str, str]:
    """Return (old, new): the settings of two rungs as text, without the sizes that both share.

    The shared sizes depend on the machine. A size that a rung sets itself is included.
    """
    names = {**rungs.LECTURE, **earlier.settings, **rung.settings}
    old, new = ({name: values[name] for name in names if name in values} for values in map(settings, (earlier, rung)))
    return "\n".join(as_assignments(old)), "\n".join(as_assignments(new))


# ---------------------------------------------------------------------------- comparing


def side_by_side(before: str, after: str) -> list[Row]:
    """Compare two sources line by line: rows that are the same, changed, removed or added.

    The left sides are the lines of `before`, the right sides the lines of `after`, both in order. Between equal lines,
    `_pairs` aligns the lines that have the most words in common.
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
    """Merge a removed line and the added line that replaces it, such as another docstring, into one row."""
    kinds = ["", *(row.kind for row in rows), "", ""]  # kinds[k + 1] belongs to row k
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
    """Yield the indices of aligned lines, in order: the alignment with the largest total word overlap."""
    overlap = [[_word_overlap(a, b) for b in right] for a in left]
    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]  # best[i][j]: total from lines i and j on
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            paired = overlap[i][j] + best[i + 1][j + 1] if overlap[i][j] >= MIN_WORD_OVERLAP else 0.0
            best[i][j] = max(paired, best[i + 1][j], best[i][j + 1])
    i = j = 0
    while i < len(left) and j < len(right):
        if overlap[i][j] >= MIN_WORD_OVERLAP and best[i][j] == overlap[i][j] + best[i + 1][j + 1]:
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


def _word_overlap(a: str, b: str) -> float:
    """Return the share of words that two lines have in common, from 0 to 1; CamelCase counts as several words."""
    words_a, words_b = (re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", line) for line in (a, b))
    common = sum(min(words_a.count(word), words_b.count(word)) for word in set(words_a))
    return 2 * common / (len(words_a) + len(words_b)) if words_a and words_b else 0.0


# ---------------------------------------------------------------------------- highlighting


def highlighted(source: str) -> list[str]:
    """Return Python code as HTML, one string per line: escaped text in spans with Pygments' classes.

    A span never crosses a line break: a docstring of three lines becomes three spans.
    """
    from pygments import highlight
    from pygments.formatters.html import HtmlFormatter
    from pygments.lexers.python import PythonLexer

    html = highlight(source, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    lines = html.split("\n")
    return lines[: len(source.split("\n"))]  # the formatter adds a line break after the last line as well
