"""The one exception that is written for the user of bardlet, and the one exit from it.

Anything a person can mend (a missing file, a typing error in a setting, a full disk) is raised as a
`BardletError` whose text is one line: what is wrong, where, and what to do. The command line prints
that line and exits with code 1; anything else that is raised is a bug, and shows its traceback.
"""

from __future__ import annotations


class BardletError(Exception):
    """What is wrong, where (file, byte, line), and what to do about it, in one line."""


def printable(value: object) -> str:
    """A value from a file as a message quotes it: not more than its first 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException) -> str:
    """What a library says, on one line of not more than 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out; PyTorch on a CPU raises a plain RuntimeError that says so."""
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text))
