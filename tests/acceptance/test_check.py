"""`bardlet check` on every attempt of tests/ladder/check, in its process, on every exercise, and on hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ladder.check import hostile
from ladder.check.mistakes import CHANGES, RIGHT, changed
from ladder.check.test_exercises import answer, each

from bardlet.cli import main
from bardlet.ladder.exercises import progress, starters
from bardlet.ladder.exercises.table import BY_NAME, EXERCISES, Exercise

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
    """No finding for a right one, of which some test passed; a mistake is named. The attempts are older than check."""
    rung = ["--rung", str(attempt["rung"])] if isinstance(attempt["rung"], int) else []
    code = main(["check", str(ATTEMPTS / attempt["file"]), "--seconds", "300", "--json", *rung])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {finding["name"] for finding in report["findings"]}
    assert not report["ended"] and code == bool(found)
    assert report["passed"] or attempt["mistake"]  # a mask that does not fit keeps everything else from running
    assert found == ({attempt["mistake"]} if attempt["mistake"] else set())


@pytest.mark.parametrize("name", hostile.FILES)
def test_hostile(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2."""
    (tmp_path / "attempt.py").write_text(hostile.code(name), encoding="utf-8")
    seconds = "10" if hostile.FILES[name][2] == hostile.LIMIT else "300"
    assert main(["check", str(tmp_path / "attempt.py"), "--seconds", seconds]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and hostile.FILES[name][2] in error


# ---------------------------------------------------------------------------------- exercises


@each
def test_the_answer_of_an_exercise(exercise: Exercise, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Done, with its date, and the next one is named."""
    starters.copy(tmp_path)
    file = tmp_path / exercise.file
    file.write_text(answer(exercise), encoding="utf-8")
    assert main(["check", str(file), "--seconds", "300", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["done"] and f"done: {exercise.title}" in lines
    upcoming = EXERCISES[(EXERCISES.index(exercise) + 1) % len(EXERCISES)]
    assert lines[-1].startswith(f"next: {upcoming.title};")
    assert list(progress.load(tmp_path).done) == [exercise.name]


@pytest.mark.parametrize(("line", "seconds", "message"), [
    ("while True: pass", "10", "it did not finish within 10 s (testing orthogonalize)"),
    ("raise SystemExit(3)", "300", "it calls exit; nothing could be tested"),
    ("import os; os._exit(5)", "300", "it ended the process with exit code 5 (testing orthogonalize)"),
    ("return torch.zeros(10 ** 11)", "300", "it needs more than 2 GB of memory; nothing")])
def test_a_hostile_answer(line: str, seconds: str, message: str, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2; nothing is done."""
    file = tmp_path / "12_muon.py"
    code = answer(BY_NAME["muon"]).replace("    x = gradient / gradient.norm()", f"    {line}")
    file.write_text(code, encoding="utf-8")
    assert main(["check", str(file), "--seconds", seconds]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not progress.load(tmp_path).done


def test_a_flood_of_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes nowhere; the answer still counts."""
    file = tmp_path / "12_muon.py"
    code = answer(BY_NAME["muon"]).replace("    x = gradient /", "    print('x' * 10 ** 7)\n    x = gradient /")
    file.write_text(code, encoding="utf-8")
    assert main(["check", str(file), "--seconds", "300"]) == 0
    assert len(capsys.readouterr().out) < 1000
