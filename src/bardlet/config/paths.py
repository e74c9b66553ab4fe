"""Paths as people write them."""

from __future__ import annotations

import os

from bardlet.errors import BardletError


def given(path: str) -> str:
    """Return a path that a person wrote, with their home folder for `~`.

    A shell expands `~` only at the beginning of a word, so not in `--out=~/run` and in a settings file.

    Raises:
        BardletError: the name is not valid UTF-8, as that of a file from an old zip archive may be.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise BardletError(f"{readable}: the name is not valid UTF-8; rename the file") from None
    return os.path.expanduser(path)
