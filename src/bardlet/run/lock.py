"""A lock on a run folder: one process at a time. It names its holder; the system frees it if the holder is killed."""

from __future__ import annotations

import errno
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

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO)
"""Errors of flock on a file system that has no locks, such as NFS without its lock service, or FUSE."""
FILES = LOCK, HOLDER = ".lock", ".holder"
"""The files of a lock: the locked file, which is empty, and the description of the holder."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder. Raise BardletError, naming the holder, if another process has it."""
    lock, name = _try_lock(run), run / HOLDER
    if lock is None:
        raise in_use(run, _describe_holder(run))
    try:
        atomic.write_text(name, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        yield
    finally:
        for path in (name, run / LOCK):  # before the release: afterwards they may be another process's
            with suppress(OSError):  # Windows cannot remove an open file
                path.unlink()
        lock.release()


def holder(run: Path) -> str | None:
    """Describe the process that holds a run folder; None if none does. BardletError if its lock cannot be opened."""
    if not os.path.lexists(run / LOCK):
        return None
    lock = _try_lock(run)
    if lock is None:
        return _describe_holder(run)
    lock.release()
    return None


def in_use(run: Path, owner: str) -> BardletError:
    """Return the error for a folder that the process `owner` holds."""
    return BardletError(f"{run}: in use by {owner}; wait for it to finish, or stop it")


def _try_lock(run: Path) -> BaseFileLock | None:
    """Acquire and return the lock of a folder; None if another process holds it."""
    path = run / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BardletError(f"{path}: not a regular file; remove it")
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock outlives a holder that is killed
    try:
        lock.acquire(timeout=0.2, poll_interval=0.02)  # a holder that is exiting may have removed the file
    except Timeout:
        return None
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            raise BardletError(f"{run}: its file system cannot lock files ({error.strerror}), as some network drives "
                               "cannot; use a folder on a local disk, or have the drive mounted with locks") from None
        raise BardletError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return lock


def _describe_holder(run: Path) -> str:
    """Return the holder's description of itself, waiting a second for it; ignore what a killed process left."""
    for _ in range(20):
        with suppress(OSError):
            text = (run / HOLDER).read_text(encoding="utf-8", errors="replace").strip()
            match = re.match(r"process (\d+) on (\S+) since", text)
            if match and (match[2] != socket.gethostname() or heartbeat.alive(int(match[1]))):
                return text
        time.sleep(0.05)
    return "another process"
