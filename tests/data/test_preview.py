"""Previews: the counts and first records are those that a training reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bardlet.cli import main
from bardlet.data.preview import EXCERPT, preview
from bardlet.errors import BardletError


def lines(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def test_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab\u0451" * 1000, encoding="utf-8")
    (tmp_path / "b.txt").write_text("second text\n", encoding="utf-8")
    found = preview("text", [str(tmp_path)])
    assert (found.unit, found.count, found.left_out, found.characters) == ("document", 2, 0, 3012)
    assert found.alphabet == len(set("ab\u0451second text\n"))
    assert found.first == [[("", ("ab\u0451" * 1000)[:EXCERPT] + " ...")], [("", "second text\n")]]


def test_conversations_and_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    empty = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    file = lines(tmp_path / "c.jsonl", [good] * 39 + [empty])
    with caplog.at_level(logging.WARNING, "bardlet"):
        found = preview("conversations", [file])
    assert (found.unit, found.count, found.left_out, found.characters) == ("conversation", 39, 1, 39 * 7)
    assert found.first == [[("user", "Hi"), ("assistant", "Hello")]] * 3
    assert "left out 1 of 40 records: line 40" in caplog.text and "--max-bad" not in caplog.text
    with caplog.at_level(logging.WARNING, "bardlet"):
        assert preview("conversations", [lines(tmp_path / "d.jsonl", [good] * 9 + [empty])]).left_out == 1
    assert "more than 5 % of the records cannot be used" in caplog.text
    with pytest.raises(BardletError, match="none of the 2 records can be used"):
        preview("conversations", [lines(tmp_path / "e.jsonl", [empty] * 2)])


def test_preferences(tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}])
    found = preview("preferences", [file])
    assert found.first == [[("user", "Hi"), ("better", "Hello"), ("worse", "No")]] and found.unit == "preference"


def test_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("ein Hund\n\nein Park\n", encoding="utf-8")
    (tmp_path / "a.en").write_text("a dog\nnothing\na park\n", encoding="utf-8")
    found = preview("pairs", [str(tmp_path / "a.de"), str(tmp_path / "a.en")])
    assert (found.count, found.left_out) == (2, 1)
    assert found.first[1] == [("source", "ein Park"), ("target", "a park")]
    with pytest.raises(BardletError, match="two files"):
        preview("pairs", [str(tmp_path / "a.de")])
    (tmp_path / "b.en").write_text("\n\n\n", encoding="utf-8")
    with pytest.raises(BardletError, match="no line has a translation"):
        preview("pairs", [str(tmp_path / "a.de"), str(tmp_path / "b.en")])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "p.jsonl", [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}])
    assert main(["data", "show", file, "--kind", "preferences"]) == 0
    assert capsys.readouterr().out == "1 preference, 9 characters\n\npreference 1\nuser: Hi\nbetter: Hello\nworse: No\n"
    assert main(["data", "show", file, "--kind", "preferences", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["first"] == [[["user", "Hi"], ["better", "Hello"], ["worse", "No"]]]
    assert main(["data", "show"]) != 0 and "data show FILE" in capsys.readouterr().err
