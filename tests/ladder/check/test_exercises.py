"""The exercises: starter files, the judge of each, hints, progress, and `bardlet check` on them."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bardlet.cli import main
from bardlet.ladder.check.known import TESTS
from bardlet.ladder.check.mistakes import DETAIL
from bardlet.ladder.check.source import read
from bardlet.ladder.exercises import progress, starters
from bardlet.ladder.exercises.table import BY_NAME, EXERCISES, Exercise
from bardlet.ladder.rungs import LADDER
from ladder.check.attempts import judged
from ladder.check.wrong import OTHER, WRONG

ROOT = Path(__file__).parents[3]
ANSWERS = ROOT / "docs" / "exercises" / "answers"
SECONDS = "600"
"""A limit against a hang."""

each = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)


def answer(exercise: Exercise) -> str:
    """Return the right answer."""
    return (ANSWERS / exercise.file).read_text(encoding="utf-8")


def changed(name: str, pairs: Sequence[str]) -> str:
    """Return the right answer to an exercise with texts replaced."""
    code = answer(BY_NAME[name])
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in code, old
        code = code.replace(old, new)
    return code


def starter(exercise: Exercise) -> str:
    """Return the text of a starter file."""
    return starters.stored(exercise).read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def unwritten_starters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The starter files as docs/starters.py writes them: somebody may have done the exercises of this clone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        written = importlib.import_module("starters")
        folder = tmp_path_factory.mktemp("starters")
        for exercise in EXERCISES:
            (folder / exercise.file).write_text(written.starter(exercise), encoding="utf-8")
        patch.setattr(starters, "stored", lambda exercise: folder / exercise.file)
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the starter files in exercises/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    assert starters.copy(Path("exercises")) == (len(EXERCISES), 0)
    return tmp_path / "exercises"


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Return the JSON object on the last line of the output."""
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(value, dict)
    return value


# ---------------------------------------------------------------------------------- starter files


def test_there_is_one_exercise_a_rung_and_the_lectures_four() -> None:
    """In order; each with tests, three different hints and a page."""
    assert [exercise.name for exercise in EXERCISES[:13]] == [rung.name for rung in LADDER]
    assert [exercise.file[0] for exercise in EXERCISES[13:]] == ["a", "b", "c", "d"]
    assert TESTS.keys() == BY_NAME.keys() and len(BY_NAME) == len(EXERCISES) == 17
    for exercise in EXERCISES:
        assert len(set(exercise.hints)) == 3 and exercise.hints[0].rstrip().count("?") == 1
        assert (ROOT / "docs" / exercise.page).is_file()


@each
def test_a_starter_file_is_short_and_complete_but_for_its_parts(exercise: Exercise) -> None:
    """At most 60 lines, PyTorch alone, a docstring with the command, and only the parts to write are missing."""
    text = starter(exercise)
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 120
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"torch"}
    assert f"bardlet check exercises/{exercise.file}" in (ast.get_docstring(tree) or "")
    assert starters.unwritten(read(Path(str(starters.stored(exercise))))) == list(exercise.parts)


@each
def test_a_starter_file_is_not_written_yet(exercise: Exercise, folder: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, a line, no traceback, and no process."""
    assert main(["check", f"exercises/{exercise.file}"]) == 1
    output = capsys.readouterr()
    assert f"not written yet: {', '.join(exercise.parts)}\n" in output.out and not output.err
    assert exercise.where in output.out and f"docs/{exercise.page}" in output.out


def test_copies_never_replace_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a file of the reader nor a link; what is missing is added."""
    (folder / "03_one_head.py").write_text("mine", encoding="utf-8")
    (folder / "04_multi_head.py").unlink()
    assert main(["check", "--start", "exercises", "--json"]) == 0
    assert report(capsys) == {"folder": "exercises", "copied": 1, "kept": 16}
    assert (folder / "03_one_head.py").read_text(encoding="utf-8") == "mine"
    assert (folder / "04_multi_head.py").read_text(encoding="utf-8") == starter(BY_NAME["multi-head"])


def test_copies_need_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of that name is one line."""
    Path("taken").write_text("", encoding="utf-8")
    assert main(["check", "--start", "taken"]) == 1
    assert capsys.readouterr().err.startswith("bardlet: taken: cannot be written")


# ---------------------------------------------------------------------------------- the judge


@each
def test_the_answer_passes(exercise: Exercise, tmp_path: Path) -> None:
    """Every test of the exercise holds."""
    found = judged(answer(exercise), tmp_path, exercise)
    assert [finding.sentence() for finding in found.findings] == [] and not found.untested
    assert list(found.passed) == [test.where for test in TESTS[exercise.name]]


@pytest.mark.parametrize(("name", "pairs"), [
    pytest.param(name, pairs, id=f"{name}-{number}") for number, (name, *pairs) in enumerate(OTHER)])
def test_an_answer_in_another_style_passes(name: str, pairs: list[str], tmp_path: Path) -> None:
    """Only the names of the starter file are fixed."""
    found = judged(changed(name, pairs), tmp_path, BY_NAME[name])
    assert [finding.sentence() for finding in found.findings] == [] and not found.untested


@pytest.mark.parametrize(("name", "part", "message", "pairs"), [
    pytest.param(name, part, message, pairs, id=f"{name}-{number}")
    for number, (name, part, message, *pairs) in enumerate(WRONG)])
def test_a_wrong_answer_is_found(name: str, part: str, message: str, pairs: list[str], tmp_path: Path) -> None:
    """With a finding for the part, and in a form that the parent accepts."""
    found = judged(changed(name, pairs), tmp_path, BY_NAME[name])
    said = [finding.sentence() for finding in found.findings if finding.where == part and finding.name == "exercise"]
    assert len(said) == 1 and message.lower() in said[0].lower(), said
    assert part not in found.passed and all(DETAIL.fullmatch(finding.detail) for finding in found.findings)


def test_there_is_a_wrong_answer_for_each_part() -> None:
    """So that no test of a part is one that cannot fail."""
    assert {(name, part) for name, part, *_ in WRONG} == {
        (name, test.where) for name, tests in TESTS.items() for test in tests}


def test_a_known_mistake_is_named(tmp_path: Path) -> None:
    """Besides the difference."""
    code = answer(BY_NAME["one-head"]).replace("torch.tril(", "torch.triu(")
    found = judged(code, tmp_path, BY_NAME["one-head"])
    assert {finding.name for finding in found.findings} == {"mask-side", "exercise"}


@each
def test_an_empty_file_is_wrong(exercise: Exercise, tmp_path: Path) -> None:
    """Every part is a finding that names what is missing."""
    found = judged("import torch\n", tmp_path, exercise)
    assert len(found.findings) == len(TESTS[exercise.name]) and not found.passed
    assert all("keep the names of the starter file" in finding.sentence() for finding in found.findings)


def test_parts_that_are_written_are_tested(tmp_path: Path) -> None:
    """The others are untested, also those that need an unwritten part."""
    exercise = BY_NAME["averaging"]
    code = answer(exercise).replace("    score = torch.zeros", "    raise NotImplementedError\n    score = torch.zeros")
    found = judged(code, tmp_path, exercise)
    assert list(found.passed) == ["average_by_loop", "average_by_matrix"] and not found.findings
    assert list(found.untested) == ["average_by_softmax"]
    exercise = BY_NAME["residual"]
    code = starter(exercise).replace('raise NotImplementedError("write Block.forward")', "return x")
    found = judged(code, tmp_path, exercise)
    assert list(found.untested) == ["FeedForward", "Block.forward"] and not found.findings and not found.passed


# ---------------------------------------------------------------------------------- the command


def test_a_right_answer_is_done_and_the_next_exercise_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its process; the date is kept, and the printed command works."""
    exercise = BY_NAME["feed-forward"]
    (folder / exercise.file).write_text(answer(exercise), encoding="utf-8")
    assert main(["check", f"exercises/{exercise.file}", "--seconds", SECONDS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "done: Feed-forward" and "no findings" in lines
    command = lines[-1].rpartition("then: ")[2]
    assert main(shlex.split(command)[1:]) == 1 and "not written yet: FeedForward.__init__, Block.forward" in (
        capsys.readouterr().out)
    assert main(["check", "--json"]) == 0
    rows = report(capsys)["exercises"]
    assert isinstance(rows, list) and [row["name"] for row in rows if row["done"]] == ["feed-forward"]


def test_the_list_needs_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """It says how to copy them, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "17 exercises, 0 done\n" in out and out.endswith("bardlet check --start exercises\n")
    assert list(tmp_path.iterdir()) == []


def test_hints_come_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three, then the last again; each exercise has its own count; nothing of the file runs."""
    path = folder / "03_one_head.py"
    path.write_text(starter(BY_NAME["one-head"]) + "\nopen('ran', 'w')\n", encoding="utf-8")
    for number in (1, 2, 3, 3):
        assert main(["check", str(path), "--hint", "--json"]) == 0
        found = report(capsys)
        assert found == {"exercise": "one-head", "hint": number, "text": BY_NAME["one-head"].hints[number - 1]}
    assert main(["check", str(folder / "d_paper.py"), "--hint"]) == 0
    assert capsys.readouterr().out.startswith("hint 1 of 3: ")
    assert not Path("ran").exists()
    assert main(["check"]) == 0 and "3 hints" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["gone.py", "--hint"], "gone.py: no such file; copy the starter files"),
    (["plain.py", "--hint"], "plain.py: names no exercise; copy the starter files"),
    (["--hint"], "--hint needs the file of an exercise"), (["plain.py", "--start", "x"], "leave out the file"),
    (["other.py"], "names no exercise; choose from bigram, averaging"), (["broken.py"], "is not valid Python")])
def test_wrong_command_lines(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    Path("plain.py").write_text("x = 1\n", encoding="utf-8")
    Path("other.py").write_text("# exercise: two-heads\n", encoding="utf-8")
    Path("broken.py").write_text("# exercise: one-head\ndef f(:\n", encoding="utf-8")
    assert main(["check", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------- progress


def test_progress_is_kept() -> None:
    """The next exercise is the first after the last one that is not done, in a circle."""
    own = progress.Progress(Path(), dict.fromkeys([each.name for each in EXERCISES[:3]], "2026-01-01"))
    assert own.upcoming() is EXERCISES[3] and own.upcoming(EXERCISES[16]) is EXERCISES[3]
    own.done = dict.fromkeys(BY_NAME, "2026-01-01")
    assert own.upcoming(EXERCISES[5]) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"exercises": 3}', b"[" * 60_000,
                                     b'{"exercises": {}}' + b" " * 70_000])
def test_a_damaged_file_counts_as_empty(content: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is reported, and the next hint replaces it."""
    (folder / progress.NAME).write_bytes(content)
    own = progress.load(folder)
    assert not own.done and not own.hints and "is damaged" in caplog.text
    caplog.clear()
    assert own.next_hint(EXERCISES[0]) == 1
    assert progress.load(folder).hints == {"bigram": 1} and not caplog.text


def test_entries_that_fit_survive_the_others(folder: Path) -> None:
    """Unknown exercises, wrong dates and counts are left out."""
    entries = {"bigram": {"done": "2026-01-02", "hints": 2}, "one-head": {"done": "\x1b[2J", "hints": 99},
               "muon": {"done": 5, "hints": True}, "gone": {"done": "2026-01-02"}, "paper": [], "heads": {"hints": 1}}
    (folder / progress.NAME).write_text(json.dumps({"exercises": entries}), encoding="utf-8")
    own = progress.load(folder)
    assert own.done == {"bigram": "2026-01-02"} and own.hints == {"bigram": 2, "heads": 1}


def test_a_folder_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress goes to the cache folder, one file a folder."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    progress.load(folder).finish(BY_NAME["muon"])
    assert not (folder / progress.NAME).exists()
    assert list(progress.load(folder).done) == ["muon"] and not progress.load(folder.parent).done


def test_progress_that_cannot_be_saved_is_a_notice(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    """Neither here nor in the cache folder; the hint is printed all the same."""
    (folder.parent / "cache").write_text("", encoding="utf-8")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert progress.load(folder).next_hint(EXERCISES[0]) == 1
    assert "your progress is not saved" in caplog.text
