"""Paths as people write them."""

from __future__ import annotations

import os
import shlex

from bardlet.errors import BardletError


def given(path: str) -> str:
    """Return a path that a person wrote, with their home folder for `~`.

    A shell expands `~` only at the beginning of a word, so not in `--out=~/run` and in a settings file.

    Raises:
        BardletError: the name is not valid UTF-8, as that of a file from an old zip archive may be; or it begins with
            `~`, and this user has no home folder.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise BardletError(f"{readable}: the name is not valid UTF-8; rename the file") from None
    expanded = os.path.expanduser(path)
    if expanded == path and (path == "~" or path.startswith(("~/", f"~{os.sep}"))):
        raise BardletError(f"{path}: this user has no home folder for ~; set HOME, or write the whole path")
    return expanded


def given_reward(reward: str) -> str:
    """Return a --reward, a folder or a command, with the home folder for `~` at its beginning."""
    if not reward.startswith("~"):
        return reward
    if os.path.isdir(folder := given(reward)):
        return folder
    program, blank, rest = reward.partition(" ")
    return f"{shlex.quote(given(program))}{blank}{rest}"


def shown(path: str) -> str:
    """Return a path with `~` for the person's home folder, if it is inside it and there is one."""
    home = os.path.expanduser("~").rstrip(os.sep)
    return f"~{path[len(home):]}" if home not in ("", "~") and path.startswith(home + os.sep) else path
