"""One process at a time in a folder: a lock that names who holds it, and that the system frees when it is killed."""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from bardlet.errors import BardletError
from bardlet.runtime import atomic, heartbeat


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, or name the one that holds it. The system frees a killed one's lock."""
    path = run / ".lock"
    handle, other = _take(path)
    if handle is None:
        raise in_use(run, other)
    with handle:
        with atomic.writing(path, 100):
            handle.truncate(0)
            handle.seek(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            handle.flush()
        try:
            yield
        finally:
            if os.name == "nt":
                handle.close()  # Windows removes no file that is open
            with suppress(OSError):
                path.unlink()  # while it is held, or another process's could be removed


def holder(run: Path) -> str | None:
    """Which process holds a run folder, in words; None: none does. BardletError where its lock cannot be opened."""
    if not (run / ".lock").exists():
        return None
    handle, other = _take(run / ".lock")
    if handle:
        handle.close()
    return other or None


def in_use(run: Path, other: str) -> BardletError:
    """What a person reads when another process holds a folder."""
    return BardletError(f"{run}: in use by {other}; wait for it, or stop it")


def _take(path: Path) -> tuple[TextIO | None, str]:
    """(lock file, ""), open and locked; (None, who has it), where another process does."""
    while True:
        handle = _open(path)
        if not _try_lock(handle):
            with handle:
                return None, _who(handle)
        with suppress(FileNotFoundError):
            if os.name == "nt" or os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle, ""
        handle.close()  # its holder was just leaving, and has removed the file that was opened here: once more


def _open(path: Path) -> TextIO:
    """The lock file, which is made where there is none: never another one that a link of its name leads to."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise BardletError(f"{path}: cannot be written ({error.strerror}); choose another folder, or remove the file "
                           "where it is a link") from None
    handle = os.fdopen(number, "r+" if stat.S_ISREG(os.fstat(number).st_mode) else "r", encoding="utf-8")
    if not handle.writable():
        handle.close()
        raise BardletError(f"{path}: is no file; remove it")
    return handle


def _who(handle: TextIO) -> str:
    """What the holder of a lock has written into it, perhaps in this moment; not what one that was killed has left."""
    for _ in range(20):
        handle.seek(0)
        text = handle.read().strip()
        known = re.match(r"process (\d+) on (\S+) since", text)
        if known and (known[2] != socket.gethostname() or heartbeat.alive(int(known[1]))):
            return text
        time.sleep(0.05)
    return "another process"


def _try_lock(handle: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        handle.seek(1 << 30)  # a byte far behind the text, which others may then read
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
