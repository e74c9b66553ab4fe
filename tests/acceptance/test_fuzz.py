"""A hundred thousand pieces of rubbish: nothing but the one error that is written for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from invariants.test_fuzz import READERS, feed, good  # noqa: F401 (a fixture)


@pytest.mark.parametrize("reader", READERS)
def test_rubbish_is_read_or_refused(reader: str, good: Path, tmp_path: Path) -> None:  # noqa: F811
    """As many for each reader."""
    feed(reader, good, tmp_path, -(-100_000 // len(READERS)))
