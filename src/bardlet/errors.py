"""The exception for the user's errors, and helpers for its messages.

Anything the user can fix (a missing file, a mistyped setting, a full disk) is raised as a `BardletError`. Its text is
one line: what is wrong, where, and what to do. The command line prints that line and exits with code 1. Any other
exception is a bug, which the command line reports as an internal error.
"""

from __future__ import annotations

import os
import shlex
import sys


class BardletError(Exception):
    """An error the user can fix, in one line: what is wrong, where (file, byte, line), and what to do."""


class Unsupported(BardletError):
    """A model of a kind that bardlet does not have; nothing is damaged."""


def printable(value: object) -> str:
    """Return the repr of a value from a file, at most 80 characters long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def quoted(path: str | os.PathLike[str]) -> str:
    """Return a path as a word of a command that is printed to be pasted into a shell, never taken for a flag."""
    word = str(path)
    word = f".{os.sep}{word}" if word.startswith("-") else word
    if sys.platform == "win32":
        from subprocess import list2cmdline

        return list2cmdline([word])
    return shlex.quote(word)


CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def neutral(text: str) -> str:
    """Return a text from a model or a file without control characters, which could command a terminal."""
    return text.translate(CONTROLS)


def one_line(error: BaseException) -> str:
    """Return a library's error message on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` means out of memory; on a CPU, PyTorch raises a plain RuntimeError whose text says so."""
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text))
