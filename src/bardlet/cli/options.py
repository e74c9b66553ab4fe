"""From words on the command line to a dataclass, by tyro; its boxed messages become one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TypeVar

from bardlet.errors import BardletError

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], command: str, default: Any = None) -> T:
    """A `kind` from `argv`; `--help` prints and exits with 0.

    Raises:
        BardletError: what is wrong with the first word that does not fit, on one line.
    """
    import tyro

    said, printed = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(printed):
            return tyro.cli(kind, args=list(argv), prog=f"bardlet {command}", default=default)
    except SystemExit as end:
        if end.code in (0, None):
            sys.stdout.write(printed.getvalue())
            raise
    what = _in_words(said.getvalue() + printed.getvalue())
    raise BardletError(f"{what}; `bardlet {command} --help` lists the settings")


def _in_words(boxed: str) -> str:
    """What a message of tyro says, without its frame."""
    lines = (line.strip("│╭╮╰╯─- ") if set(line) <= set("│╭╮╰╯─- ") else line.strip("│╭╮╰╯─ ")
             for line in boxed.splitlines())
    text = " ".join(line for line in lines if line)
    if unknown := re.search(r"Unrecognized options: (\S+?),? ", text + " "):
        near = re.search(r"Perhaps you meant: (--[\w-]+)", text)
        return f"there is no setting {unknown[1]}" + (f" (did you mean {near[1]}?)" if near else "")
    if wrong := re.search(r"Error parsing (--[\w-]+): .*?matching (?:\{None\}\|)?(\S+) .*? from \['(.*?)'\]", text):
        return f"{wrong[1]} {wrong[3]}: it must be of type {wrong[2]}"
    if wrong := re.search(r"Error parsing (--[\w-]+): (.*?)\.? (Argument helptext|For full|$)", text + " "):
        return f"{wrong[1]}: {wrong[2]}"
    if missing := re.search(r"(?:Required options|Missing).*?: (.*?)\.? (?:Argument|For full|$)", text + " "):
        return f"something is missing: {missing[1]}"
    return text.split(" Argument helptext")[0].split(" For full helptext")[0]
