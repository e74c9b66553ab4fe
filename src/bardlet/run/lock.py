"""One process at a time in a folder: a lock that names who holds it, and that the system frees when it is killed."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from bardlet.errors import BardletError
from bardlet.runtime import atomic, heartbeat


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, or name the one that holds it. The system frees a killed one's lock."""
    path = run / ".lock"
    lock = _taken(path)
    if lock is None:
        raise in_use(run, _who(path))
    try:
        with atomic.writing(path, 100):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            path.unlink()  # while it is held, or another process's could be removed
        lock.release()


def holder(run: Path) -> str | None:
    """Which process holds a run folder, in words; None: none does. BardletError where its lock cannot be opened."""
    path = run / ".lock"
    if not os.path.lexists(path):
        return None
    lock = _taken(path)
    if lock is None:
        return _who(path)
    lock.release()
    return None


def in_use(run: Path, other: str) -> BardletError:
    """What a person reads when another process holds a folder."""
    return BardletError(f"{run}: in use by {other}; wait for it, or stop it")


def _taken(path: Path) -> BaseFileLock | None:
    """The lock, held now; None where another process holds it."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BardletError(f"{path}: is no file; remove it")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        raise BardletError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return lock


def _who(path: Path) -> str:
    """What the holder of a lock has written into it, perhaps in this moment; not what one that was killed has left."""
    for _ in range(20):
        with suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            known = re.match(r"process (\d+) on (\S+) since", text)
            if known and (known[2] != socket.gethostname() or heartbeat.alive(int(known[1]))):
                return text
        time.sleep(0.05)
    return "another process"
