"""The docstrings of settings: the help of the command line, and the explanations in the studio."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise


@cache
def docs(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, those of its bases included, on one line each."""
    docstrings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("bardlet") and "__annotations__" in vars(base):
            [body] = [node.body for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body
                      if isinstance(node, ast.ClassDef)]
            for line, below in pairwise(body):
                if (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                        and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                    docstrings[line.target.id] = " ".join(str(below.value.value).split())
    return docstrings


def first_sentence(text: str) -> str:
    """Return a help text up to its first full stop or semicolon."""
    ends = [text.find(mark) for mark in (". ", "; ") if mark in text]
    return text[: min(ends)] if ends else text.rstrip(".")
