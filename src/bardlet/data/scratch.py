"""Temporary files for texts that do not fit in memory: they vanish when they are closed, or with the process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any, cast

from bardlet.data.named import cache_folder
from bardlet.errors import BardletError


def scratch_file(in_memory: int) -> IO[bytes]:
    """Return a temporary file in the cache folder. It stays in memory up to `in_memory` bytes."""
    folder: Any = cache_folder() / "scratch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = None
    return cast(IO[bytes], tempfile.SpooledTemporaryFile(max_size=in_memory, dir=folder))


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Raise BardletError, with the folder and a remedy, if a temporary file cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise BardletError(f"{cache_folder()}: cannot write a temporary copy of the text here ({reason}); free some "
                           "space, or set BARDLET_CACHE to another folder") from None
