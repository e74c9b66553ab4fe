"""Atomic writes: a file is complete or absent. A full disk becomes a one-line error with a remedy."""

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
    errno.EFBIG: "raise the file size limit (ulimit -f), or choose another --out",
    errno.EACCES: "choose a folder that you can read and write",
    errno.EROFS: "choose a folder that you can write to",
    errno.EIO: "the disk may be failing: back it up, and choose another --out",
}
"""The remedy for each system error."""


def write_atomically(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Call `write` with a temporary path next to `path`, flush that file and rename it to `path`.

    A kill leaves the old file or the new one. Raises BardletError if writing fails; on a full disk it reports the bytes
    `needed` and free.
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
    """Write `text` to `path` as UTF-8, atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"), len(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "r+b") as f:  # Windows flushes only files that are open for writing
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to the disk; Windows and some network disks cannot."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder with write permission only
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Remove a folder that others may be reading: rename it first, then delete its files. Ignore errors.

    For a symbolic link, remove only the link.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    renamed = folder.with_name(f".{folder.name}.{os.getpid()}.gone.tmp")
    shutil.rmtree(renamed, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def explain_write_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn system errors inside into a BardletError with `path` and, on a full disk, the bytes needed and free."""
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
    """Return the errno of an error, or None; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else None


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist; 0 if unknown."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0
