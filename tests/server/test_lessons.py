"""The lessons of the tab Learn."""

from __future__ import annotations

from typing import Any

import pytest

from bardlet.ladder.rungs import LADDER
from bardlet.server import lessons
from bardlet.server.errors import Refusal


def row(name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "state": "finished", "text": "tinyshakespeare", "val_loss": 2.49, **values}


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_each_rung_has_a_lesson(rung: Any) -> None:
    """Its page has the sections that the tab shows, without directives, links and answers."""
    lesson = lessons.lesson(rung.number)
    for section in ("what", "why", "exercise", "code"):
        assert len(lesson[section]) > 50, section
        assert not any(mark in lesson[section] for mark in ("{{", "???", "](")) or section == "code"
    assert "steps" in lesson["settings"] or rung.scaled
    assert lesson["commands"][1] == f"bardlet check exercises/{rung.number:02}_{rung.name.replace('-', '_')}.py"


def test_a_number_without_a_rung() -> None:
    for number in (0, 14, -1):
        with pytest.raises(Refusal):
            lessons.lesson(number)


def test_the_readers_newest_run_of_each_rung() -> None:
    rows = lessons.overview([row("ladder/01-bigram/seed-7", val_loss=2.488), row("ladder/01-bigram/seed-1337"),
                             row("ladder/03-one-head/seed-1", state="running"), row("02-averaging/seed-1"), row("x")])
    assert [each["number"] for each in rows] == list(range(1, 14))
    assert rows[0]["run"] == "ladder/01-bigram/seed-7" and rows[0]["verdict"] == "normal"
    assert rows[1]["run"] == "02-averaging/seed-1" and rows[2]["run"] is None
    assert rows[0]["lecture"] == 2.5 and rows[0]["band"][0] < 2.488 < rows[0]["band"][1]


@pytest.mark.parametrize(("loss", "text", "verdict"), [(2.6, "tinyshakespeare", "higher than normal"),
                                                       (2.0, "tinyshakespeare", "lower than normal"),
                                                       (2.6, "mine", "")])
def test_losses_are_compared_on_the_same_text_only(loss: float, text: str, verdict: str) -> None:
    first = lessons.overview([row("ladder/01-bigram/seed-7", val_loss=loss, text=text)])[0]
    assert first["verdict"] == verdict and bool(first["band"]) == (text == "tinyshakespeare")
