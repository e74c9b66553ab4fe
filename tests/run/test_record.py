"""The record of a run: its documentation."""

from dataclasses import fields
from pathlib import Path

from bardlet.run.record import RECORDS, PreferencesRecord

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "elsewhere.md"


def test_the_guide_explains_every_entry() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    names = {field.name for record in (*RECORDS, PreferencesRecord) for field in fields(record)}
    assert not [name for name in sorted(names) if f"`{name}`" not in text]
