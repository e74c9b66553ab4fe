"""Starter files: the exercise of a file, the parts that are still to write, and copies for a reader.

Nothing here runs a reader's code.
"""

from __future__ import annotations

import ast
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from bardlet.errors import BardletError
from bardlet.ladder.check.source import MOST_BYTES, Source
from bardlet.ladder.exercises.table import BY_NAME, EXERCISES, Exercise
from bardlet.runtime.atomic import explain_write_errors

LINE = re.compile(r"(?m)^#[ \t]*exercise:[ \t]*(\S+)[ \t]*\r?$")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def find(path: Path) -> Exercise | None:
    """Return the exercise that a file names in a line such as `# exercise: one-head`; None without such a line.

    Raises:
        BardletError: no exercise has that name.
    """
    try:
        if path.suffix == ".ipynb" or path.stat().st_size > MOST_BYTES:
            return None
        match = LINE.search(path.read_bytes().decode("utf-8", "replace"))
    except OSError:  # the check says why
        return None
    if match is None:
        return None
    if match[1] not in BY_NAME:
        raise BardletError(f"{path}: its line '# exercise: {match[1][:40]}' names no exercise; "
                           f"choose from {', '.join(BY_NAME)}, or remove the line")
    return BY_NAME[match[1]]


def functions(tree: ast.Module) -> dict[str, Function]:
    """Return the functions and methods of a file by name: `average_by_loop`, `Head.forward`."""
    found: dict[str, Function] = {}
    for node in tree.body:
        if isinstance(node, Function):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}": each for each in node.body if isinstance(each, Function)}
    return found


def unwritten(source: Source) -> list[str]:
    """Return the functions of a file whose body still raises NotImplementedError, in their order."""
    return [name for name, node in functions(source.tree).items() if any(map(_raises, node.body))]


def _raises(statement: ast.stmt) -> bool:
    """Return True for `raise NotImplementedError`, with or without a message."""
    if not isinstance(statement, ast.Raise) or statement.exc is None:
        return False
    raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def stored(exercise: Exercise) -> Traversable:
    """Return the starter file of an exercise: in a wheel beside the ladder's code, in a clone in exercises/."""
    packed = resources.files("bardlet") / "ladder" / "starters" / exercise.file
    return packed if packed.is_file() else Path(__file__).parents[4] / "exercises" / exercise.file


def copy(folder: Path) -> tuple[int, int]:
    """Copy the starter files to a folder, which is created; return how many were copied, and how many were there.

    A file that exists stays as it is.
    """
    copied = 0
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for exercise in EXERCISES:
        path = folder / exercise.file
        with explain_write_errors(path):
            try:
                with path.open("x", encoding="utf-8", newline="\n") as file:
                    file.write(stored(exercise).read_text(encoding="utf-8"))
                copied += 1
            except FileExistsError:
                continue
    return copied, len(EXERCISES) - copied
