"""Notebooks of the course, written from notebooks/sources/ and from the course's pages.

    python docs/notebooks.py        # or: make notebooks

A source is Markdown like a page of the course: its text becomes text cells, its Python blocks become code cells. A
heading of level 2 begins a new cell. The first code cell has the parameters. All directives of `directives.py` work,
and three more, each on a line of its own:

    {{ part: rungs/03-one-head.md | What | Why:2 }}    sections of a page; with a number, its first paragraphs
    {{ rung: 3 }}                                      a code cell with the parts that the rung adds
    {{ listing: bardlet.training.losses.dpo_loss }}    the source of a function or class, as text

`{{ part: stages/sft.md | :1 }}` is the first paragraph of the page itself, before its sections.
The files have no outputs, and the same sources give the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import course
import directives
from course import ROOT, Course

from bardlet.errors import BardletError
from bardlet.ladder import rungs, sources

FOLDER = ROOT / "notebooks"
KEPT = ("answer", "measured", "verdict", "setting", "seen")
"""Directives that a part of a page keeps; code, figures and results of the others are made by the notebook itself."""
ADAPTED = {
    "[How to read a loss](../index.md#how-to-read-a-loss) explains the band and the ±, once for all pages.": "",
    ": see [the loss before any training](../maths.md#the-loss-before-any-training)": "",
    "([How to start Python for it](../index.md#exercises-change-and-train); `Text` has the characters as integers.)":
        "(`train_ids` has the characters as integers.)",
    "For the loss at each position you need Python; the answer shows how.": "",
    "So choose on the **development split**: `--val-part dev` cuts the last tenth off the training split and measures "
    "there.": "So choose on a **development split**: cut the last tenth off `train_ids`, and measure there.",
    "not with the table above": "not with the band",
    "(`--seed 1338` with `bardlet train`, or `bardlet ladder --rungs 5 --seeds 2`)": "(`learn(5, FeedForwardModel, "
    "seed=1338)`)",
    "(With 24 blocks no gradient arrives at all: see the experiment above.)": "",
    "(RMSNorm, in the last line, is the norm of [rung 9](09-rotary.md).)": "",
}
"""Sentences of pages that a notebook says differently."""

# ---------------------------------------------------------------------------- parts of pages


def adapted(text: str) -> str:
    """Return the text of a page with the sentences of ADAPTED replaced, wherever its lines break."""
    for sentence, instead in ADAPTED.items():
        text = re.sub(r"\s+".join(map(re.escape, sentence.split())), instead.replace("\\", r"\\"), text)
    return text


def sections(text: str) -> dict[str, str]:
    """Return the sections of a page by title; "" is the text before the first of them, without the page's title."""
    _, *parts = re.split(r"^#+ (.*)\n", text, flags=re.M)
    titles, bodies = parts[::2], parts[1::2]
    return {"": bodies[0].strip(), **{title: body.strip() for title, body in zip(titles[1:], bodies[1:], strict=True)}}


def part(course: Course, argument: str) -> str:
    """Return sections of a page as the text of a notebook. Raises BardletError for a section that is missing."""
    page, *wanted = (word.strip() for word in argument.split("|"))
    file = course.docs / page
    if not file.is_file():
        raise BardletError(f"part: docs/{page} does not exist; name a page, as in: rungs/03-one-head.md")
    found, texts = sections(adapted(file.read_text(encoding="utf-8"))), []
    for word in wanted:
        title, _, count = word.partition(":")
        if title not in found:
            raise BardletError(f"part: docs/{page} has no section '{title}'; choose from {', '.join(found)}")
        text = plain(directives.expand(kept(found[title]), page, course))
        texts.append("\n\n".join(text.split("\n\n")[: int(count)]) if count else text)
    return "\n\n".join(texts)


def kept(text: str) -> str:
    """Return a section without the directives that a notebook replaces by cells of its own."""
    lines = [line for line in text.split("\n")
             if not (match := directives.DIRECTIVE.fullmatch(line.strip())) or match.group(1) in KEPT]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Return the text of a page for a notebook: no notes, commands and links into the course; an answer folds."""
    text = re.sub(r"^!!! .*\n(?:(?:    .*)?\n)*", "", text + "\n", flags=re.M)
    text = re.sub(r"^```\w*\nbardlet [^`]*```\n", "", text, flags=re.M)
    text, fold, answer = text.partition('??? success "Answer"\n')
    if fold:
        inside = "\n".join(line.removeprefix("    ") for line in answer.split("\n")
                           if not line or line.startswith("    "))
        text = f"{text.strip()}\n\n<details><summary>Answer</summary>\n\n{inside.strip()}\n\n</details>"
    text = re.sub(r"^Next: .*(?:\n.+)*", "", text, flags=re.M)
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# ---------------------------------------------------------------------------- code


def rung_code(argument: str) -> str:
    """Return the parts that a rung adds."""
    rung = course.one_rung(f"rung {argument}")
    before = rungs.predecessor(rung)
    new = (name for name in rung.parts if before is None or name not in before.parts)
    return "\n\n\n".join(sources.part(name).code for name in new)


def listing(argument: str) -> str:
    """Return the source of a function or class as a block of text."""
    module, _, name = argument.rpartition(".")
    path = ROOT / "src" / (module.replace(".", "/") + ".py")
    defined = sources.definitions(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in defined:
        raise BardletError(f"listing: there is no {argument}; name a function or class, as in: "
                           "bardlet.training.losses.dpo_loss")
    return f"```python\n{defined[name][1]}\n```"


# ---------------------------------------------------------------------------- notebooks


def cells(text: str, name: str, course: Course) -> Iterator[tuple[str, str]]:
    """Yield the cells of a source, each as ("markdown" or "code", text). Raises BardletError."""
    for block in re.split(r"(^```python\n.*?^```\n|^\{\{ rung: \d+ \}\}\n)", text, flags=re.M | re.S):
        if block.startswith("```python\n"):
            yield "code", directives.expand(block.removeprefix("```python\n").removesuffix("```\n"), name, course)
        elif block.startswith("{{ rung: "):
            yield "code", rung_code(re.sub(r"\D", "", block))
        else:
            for cell in filter(str.strip, re.split(r"^(?=## )", block, flags=re.M)):
                yield "markdown", directives.expand(inserted(cell, course), name, course)


def inserted(text: str, course: Course) -> str:
    """Return text with its parts of pages and listings."""
    text = re.sub(r"^\{\{ part: (.+) \}\}$", lambda match: part(course, match[1]), text, flags=re.M)
    return re.sub(r"^\{\{ listing: (.+) \}\}$", lambda match: listing(match[1]), text, flags=re.M)


def notebook(text: str, name: str, course: Course) -> str:
    """Return the file of a notebook, which has no outputs. text: its source; name: that of the source."""
    made: list[dict[str, Any]] = []
    for kind, source in cells(text, name, course):
        lines = source.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": kind, "id": f"cell-{len(made) + 1}", "metadata": {}, "source": lines}
        if kind == "code":
            first = all(other["cell_type"] != "code" for other in made)
            cell |= {"execution_count": None, "metadata": {"tags": ["parameters"]} if first else {}, "outputs": []}
        made.append(dict(sorted(cell.items())))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4,
             "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def notebooks() -> dict[Path, str]:
    """Return every notebook by its path. Raises BardletError for a source that cannot be written."""
    data, made = Course.load(ROOT / "docs"), {}
    for path in sorted((FOLDER / "sources").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        made[FOLDER / f"{path.stem}.ipynb"] = notebook(text, f"../notebooks/sources/{path.name}", data)
    return made


def main() -> None:
    """Write the notebooks."""
    try:
        made = notebooks()
    except BardletError as error:
        sys.exit(str(error))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {path.relative_to(ROOT).as_posix()}")


if __name__ == "__main__":
    main()
