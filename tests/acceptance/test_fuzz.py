"""A hundred thousand corrupted files: each is read, or refused with a BardletError."""

from __future__ import annotations

from pathlib import Path

import pytest
from invariants.test_fuzz import READERS, feed, good  # noqa: F401 (a fixture)


@pytest.mark.parametrize("reader", READERS)
def test_corrupted_files_are_read_or_refused(reader: str, good: Path, tmp_path: Path) -> None:  # noqa: F811
    """The files are divided evenly among the readers."""
    feed(reader, good, tmp_path, -(-100_000 // len(READERS)))
