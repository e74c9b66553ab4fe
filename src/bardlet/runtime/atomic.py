"""Atomic writes: a file is whole or not there. A full disk is one line that says what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError

REMEDIES = {
    errno.ENOSPC: "free some space, or choose another --out",
    errno.EDQUOT: "free some space, or choose another --out",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another --out",
    errno.EACCES: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written to",
    errno.EIO: "the disk may be failing: copy what is on it, and choose another --out",
}
"""What to do about an error of the system."""


def write_atomically(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Have `write` make a file beside `path`, flush it, then rename it: `path` is the old file or the new one.

    Raises BardletError, with the bytes that are `needed` and those that are free, where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_write_errors(path, needed):
        try:
            write(temporary)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 at `path`, atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"), len(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON at `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Have the system put a file's bytes on the disk."""
    with open(path, "r+b") as f:  # Windows flushes only what may be written to
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system can: Windows cannot, nor can some network disks."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to and not be listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Remove a folder that others may read: it loses its name before the first of its files. One that resists stays.

    Of a link, the link.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.gone.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def explain_write_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """What fails inside becomes a BardletError that names `path`, and the bytes that are needed and free."""
    try:
        yield
    except BardletError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        why = os.strerror(number).lower()
        if number in (errno.ENOSPC, errno.EDQUOT):
            why += (f": {needed:,} bytes are needed," if needed else ":") + f" {free_bytes(path):,} are free"
        remedy = REMEDIES.get(number, "check the path and the disk")
        raise BardletError(f"{path}: cannot be written: {why}; {remedy}") from None


def _errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors hides it in a sentence."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def free_bytes(path: Path) -> int:
    """The bytes that are free where `path` is, or is to be; 0 where nobody can tell."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0
