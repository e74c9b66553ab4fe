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

FILES = LOCK, HOLDER = ".lock", ".holder"
"""The files of a lock: what is locked, which is empty, and who holds it."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, or name the one that holds it. The system frees a killed one's lock."""
    lock, name = _raise_taken(run), run / HOLDER
    if lock is None:
        raise in_use(run, _describe_holder(run))
    try:
        atomic.write_text(name, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        yield
    finally:
        for path in (name, run / LOCK):  # while it is held, or another process's could be removed
            with suppress(OSError):  # Windows removes no file that is open
                path.unlink()
        lock.release()


def holder(run: Path) -> str | None:
    """Which process holds a run folder, in words; None: none does. BardletError where its lock cannot be opened."""
    if not os.path.lexists(run / LOCK):
        return None
    lock = _raise_taken(run)
    if lock is None:
        return _describe_holder(run)
    lock.release()
    return None


def in_use(run: Path, other: str) -> BardletError:
    """What a person reads when another process holds a folder."""
    return BardletError(f"{run}: in use by {other}; wait for it, or stop it")


def _raise_taken(run: Path) -> BaseFileLock | None:
    """The lock of a folder, held now; None where another process holds it."""
    path = run / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BardletError(f"{path}: is no file; remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.02)  # its holder may be leaving, and have removed the file
    except Timeout:
        return None
    except OSError as error:
        raise BardletError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return lock


def _describe_holder(run: Path) -> str:
    """What the holder of a lock says of itself, perhaps in this moment; not what one that was killed has left."""
    for _ in range(20):
        with suppress(OSError):
            text = (run / HOLDER).read_text(encoding="utf-8", errors="replace").strip()
            known = re.match(r"process (\d+) on (\S+) since", text)
            if known and (known[2] != socket.gethostname() or heartbeat.alive(int(known[1]))):
                return text
        time.sleep(0.05)
    return "another process"
