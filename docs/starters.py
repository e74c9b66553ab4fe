"""Write the starter files, exercises/*.py, from their answers in docs/exercises/answers/; directives for both.

    python docs/starters.py

A starter file is its answer, with a line that raises NotImplementedError in place of each part to write.
"""

from __future__ import annotations

import ast
import posixpath

from course import ROOT, Course, fence, table_of

from bardlet.errors import BardletError
from bardlet.ladder import sources
from bardlet.ladder.exercises.starters import functions
from bardlet.ladder.exercises.table import BY_NAME, EXERCISES, Exercise

ANSWERS = ROOT / "docs" / "exercises" / "answers"
FOLDER = ROOT / "exercises"


def starter(exercise: Exercise) -> str:
    """Return the text of a starter file."""
    text = (ANSWERS / exercise.file).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    found = functions(tree)
    for part in sorted(exercise.parts, key=lambda part: found[part].lineno, reverse=True):
        body = found[part].body
        kept = int(ast.get_docstring(found[part]) is not None)
        kept += ast.unparse(body[kept]) == "super().__init__()"  # a line that is easy to forget, and not the point
        first, last = body[kept].lineno, body[-1].end_lineno
        lines[first - 1 : last] = [f'{" " * body[-1].col_offset}raise NotImplementedError("write {part}")']
    return "\n".join([header(exercise), *lines[tree.body[0].end_lineno :]]) + "\n"


def header(exercise: Exercise) -> str:
    """Return the docstring of a starter file."""
    parts = exercise.parts
    names = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return (f'"""{exercise.title}. {exercise.task}\n\nWrite {names}. Then run, in the folder above this file:\n\n'
            f"    bardlet check exercises/{exercise.file}  # with --hint: a hint\n\n"
            f'Explained in {exercise.where}, and in docs/{exercise.page}.\n"""')


# ---------------------------------------------------------------------------- directives


def shown(course: Course, argument: str, page: str) -> str:
    """Show how to begin an exercise and how to check it, and fold the code that passes."""
    if argument not in BY_NAME:
        raise BardletError(f"there is no exercise '{argument}'; choose from {', '.join(BY_NAME)}")
    exercise = BY_NAME[argument]
    text = (ANSWERS / exercise.file).read_text(encoding="utf-8")
    defined = sources.definitions(text)
    names = dict.fromkeys(part.partition(".")[0] for part in exercise.parts)
    code = fence("python", "\n\n\n".join(defined[name][1] for name in names), exercise.file)
    parts = " and ".join(f"`{part}`" for part in exercise.parts)
    return "\n".join([
        f"**Write it yourself.** Open `exercises/{exercise.file}`, write {parts}, and let bardlet check it:", "",
        fence("", f"bardlet check exercises/{exercise.file}\n"
                  f"bardlet check exercises/{exercise.file} --hint     # three hints: a question, the idea, the line"),
        "", '??? success "Code that passes"', "", *(f"    {line}".rstrip() for line in code.split("\n"))])


def listed(course: Course, argument: str, page: str) -> str:
    """Show every exercise in a table."""
    rows = []
    for exercise in EXERCISES:
        link = posixpath.relpath(exercise.page, posixpath.dirname(page))
        number = exercise.file.split("_")[0].lstrip("0")
        parts = ", ".join(f"`{part}`" for part in exercise.parts)
        source = exercise.minute or ("the lecture's exercises" if number.isalpha() else "")
        rows.append([f"{number}. [{exercise.title}]({link})", f"`{exercise.file}`", parts, source])
    return table_of(["exercise and page", "file", "to write", "lecture"], rows)


def main() -> None:
    """Write every starter file."""
    FOLDER.mkdir(exist_ok=True)
    for exercise in EXERCISES:
        (FOLDER / exercise.file).write_text(starter(exercise), encoding="utf-8")


if __name__ == "__main__":
    main()
