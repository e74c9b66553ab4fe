"""The course's directives, which insert code from the sources and results from runs; hooks for mkdocs.

A page writes a directive, `{{ name: argument }}`, on a line of its own or, for a single value, within a line. The table
DIRECTIVES below lists them all. A directive that fails stops the build and names its page and line. Results come from
measured.json and figures/ (written by `python benchmarks/ladder.py publish`) and from answers.json (written by
docs/answers.py). With BARDLET_DOCS_DRAFT=1, a missing result becomes "not measured yet".
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import course
import diagrams
import engine_table
import live
import losses
import starters
from course import PENDING, Course, Missing

from bardlet.errors import BardletError

DIRECTIVE = re.compile(r"\{\{ ([a-z]+)(?:: (.+?))? \}\}")
CODE = re.compile(r"(<pre>(?:<span></span>)?<code>)(.*?)(</code></pre>)", re.S)
TABLE = re.compile(r"<table>(.*?</table>)", re.S)
LISTING = re.compile(r"(<(pre|code)\b.*?</\2>)", re.S)
TOGETHER = re.compile(r"(?<=\d) (?=%)|(?<=\d) (?=± \d)|(?<=±) (?=\d)")
"""Spaces within a figure: 92.3 ± 1.6 %."""
OPTION = re.compile(r"(?<![\w-])--?\w[\w=-]*")

DIRECTIVES: dict[str, Callable[[Course, str, str], str]] = {
    "code": course.code,  # rung 3: its new parts
    "changes": course.changes,  # rung 3: as a diff against rung 2
    "whole": course.whole,  # rung 3: all of its code, folded
    "translated": course.translated,  # NAME in translation.json
    "result": course.result,  # FILE NAME KEY=VALUE ...: a figure from the results of a benchmark
    "source": course.source,  # bardlet.MODULE.NAME, FILE or FILE:NAME; then | WORD, to highlight the lines with it
    "losses": losses.losses,  # rung 3: the normal losses
    "verdict": losses.verdict,  # rung 9: did it help?
    "compare": losses.compare,  # NAME with rung 8; NAME is one of the extras of measured.json
    "table": losses.table,  # 1-7
    "sample": losses.sample,  # rung 3: its sample
    "figure": losses.figure,  # NAME | alternative text
    "measured": losses.measured,  # PATH in measured.json
    "answer": losses.answer,  # NAME in answers.json
    "setting": course.setting,  # scaled n_embd: a size of the larger rungs on a CPU, or: small n_embd
    "settings": losses.settings,  # no argument: the settings of the rungs
    "seen": losses.seen,  # rung 8: its epochs
    "starter": starters.shown,  # NAME of an exercise: its starter file, how to check it, and its answer
    "exercises": starters.listed,  # no argument: all exercises
    "experiment": course.experiment,  # NAME
    "live": live.live,  # rung 3 | attention: a model to play with; see live.py
    "diagram": diagrams.diagram,  # NAME | alternative text
    "engines": engine_table.engines,  # no argument: which engines write the same tokens
    "help": course.command_help,  # NAME of a command: all of its settings
}


# ---------------------------------------------------------------------------- pages


def expand(markdown: str, page: str, course: Course) -> str:
    """Replace the directives of `markdown` by their text. `page` is the file's path below docs/, for links and errors.

    Raises BardletError, with page and line, for a directive that is unknown or fails.
    """
    return "\n".join(_expand_line(line, page, number, course)
                     for number, line in enumerate(markdown.split("\n"), start=1))


def _expand_line(line: str, page: str, number: int, course: Course) -> str:
    alone = DIRECTIVE.fullmatch(line.strip())
    indent = line[: len(line) - len(line.lstrip())] if alone else ""

    def answer(match: re.Match[str]) -> str:
        name, argument = match.group(1), (match.group(2) or "").strip()
        try:
            if name not in DIRECTIVES:
                raise BardletError(f"unknown directive; choose from {', '.join(sorted(DIRECTIVES))}")
            text = DIRECTIVES[name](course, argument, page)
        except Missing as missing:
            if not course.draft:
                raise BardletError(f"docs/{page}, line {number}: {match.group()}: {missing}") from None
            text = PENDING
        except BardletError as error:
            raise BardletError(f"docs/{page}, line {number}: {match.group()}: {error}") from None
        if not alone and "\n" in text:
            raise BardletError(f"docs/{page}, line {number}: {match.group()}: must be on a line of its own")
        return "\n".join(indent + part if part else part for part in text.split("\n"))

    return DIRECTIVE.sub(answer, line.strip() if alone else line)


# ---------------------------------------------------------------------------- hooks that mkdocs calls


_course: Course | None = None
_pictures = tempfile.TemporaryDirectory(prefix="bardlet-docs-")  # deleted when the build ends


def on_files(files: Any, config: Any) -> Any:
    """Load the results, run the experiments that pages ask for, and add their pictures to the site's files."""
    global _course
    from mkdocs.structure.files import File

    docs, folder = Path(config.docs_dir), Path(_pictures.name)
    _course = Course.load(docs, folder)
    for file in files.documentation_pages():
        for name, argument in DIRECTIVE.findall(file.content_string):
            if name == "experiment":
                _run_experiment(_course, name, argument, file.src_uri)
    for path in sorted(folder.glob("*.png")):
        files.append(File.generated(config, f"experiments/{path.name}", abs_src_path=str(path)))
    for address, content in live.site_files():
        files.append(File.generated(config, address, content=content))
    return files


def _run_experiment(course: Course, name: str, argument: str, page: str) -> None:
    """Run an experiment ahead of its page; an error is reported later, with the page and its line."""
    try:
        DIRECTIVES[name](course, argument, page)
    except BardletError:
        return


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Replace the directives of a page; an error stops the build and names the page and line."""
    from mkdocs.exceptions import PluginError

    assert _course is not None
    try:
        return expand(markdown, page.file.src_uri, _course)
    except BardletError as error:
        raise PluginError(str(error)) from None


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Add the scripts of a page's live parts, and prepare the page for narrow screens."""
    return live.with_scripts(unbroken(reachable(html)), page.file.src_uri)


def unbroken(html: str) -> str:
    """Return a page that breaks no line within a figure, or within an option such as --steps."""
    parts = LISTING.split(html)
    for n, part in enumerate(parts):  # text, listing, its element, text, ...
        if n % 3 == 0:
            parts[n] = TOGETHER.sub("\u00a0", part)
        elif n % 3 == 2:
            parts[n] = ""
        elif part.startswith("<code"):
            parts[n] = OPTION.sub(r'<span class="option">\g<0></span>', part)
    return "".join(parts)


def reachable(html: str) -> str:
    """Return a page whose code, and whose tables without links, can get the focus, so that the keyboard scrolls them.

    Material does so for code only where there is a mouse.
    """
    html = CODE.sub(r'\1<span tabindex="0">\2</span>\3', html)
    return TABLE.sub(lambda match: match[0] if "<a " in match[0] else f'<table tabindex="0">{match[1]}', html)


def on_post_build(*, config: Any) -> None:
    """Write the search index also as a script: Material loads it when a page is opened from the disk.

    Without the script, every page opened from the disk would log an error. Searching still needs a server, because
    browsers do not let a page from the disk start the search worker.
    """
    search = Path(config.site_dir) / "search"
    index = (search / "search_index.json").read_text(encoding="utf-8")
    (search / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")
