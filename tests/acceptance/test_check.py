"""`bardlet check` on every attempt of tests/ladder/check, in its process, and on hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ladder.check import hostile
from ladder.check.mistakes import CHANGES, RIGHT, changed

from bardlet.cli import main

ATTEMPTS = Path(__file__).parent / "attempts"
CASES = [pytest.param(file, name, pairs, id=f"{file.removesuffix('.py')}-{name}-{number}")
         for number, (file, name, *pairs) in enumerate(CHANGES)]


def names(file: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the names of the findings of `bardlet check FILE`, after a look at its exit code."""
    code = main(["check", str(file), "--seconds", "300", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {finding["name"] for finding in report["findings"]}
    assert code == bool(found) and not report["ended"], report
    return found


@pytest.mark.parametrize("file", sorted(path.name for path in RIGHT.glob("*.py")))
def test_right(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No finding, with training."""
    assert names(RIGHT / file, capsys) == set()


@pytest.mark.parametrize(("file", "name", "pairs"), CASES)
def test_mistake(file: str, name: str, pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name, and no other."""
    (tmp_path / "attempt.py").write_text(changed(file, *pairs), encoding="utf-8")
    assert names(tmp_path / "attempt.py", capsys) == {name}


@pytest.mark.parametrize("attempt", json.loads((ATTEMPTS / "index.json").read_text()), ids=lambda each: each["file"])
def test_an_attempt_of_somebody_who_had_not_seen_check(attempt: dict[str, Any],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """No finding for a right one; a mistake is named. The attempts are older than check."""
    rung = ["--rung", str(attempt["rung"])] if isinstance(attempt["rung"], int) else []
    code = main(["check", str(ATTEMPTS / attempt["file"]), "--seconds", "300", "--json", *rung])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {finding["name"] for finding in report["findings"]}
    assert not report["ended"] and report["passed"] and code == bool(found)
    assert attempt["mistake"] in found if attempt["mistake"] else not found


@pytest.mark.parametrize("name", hostile.FILES)
def test_hostile(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2."""
    (tmp_path / "attempt.py").write_text(hostile.code(name), encoding="utf-8")
    seconds = "10" if hostile.FILES[name][2] == hostile.LIMIT else "300"
    assert main(["check", str(tmp_path / "attempt.py"), "--seconds", seconds]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and hostile.FILES[name][2] in error
