"""The process: exit codes, --json, files that end it, and a report that is treated as a stranger's data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bardlet.cli import main
from bardlet.ladder.check import run
from bardlet.ladder.check.run import NotChecked, Verdict
from bardlet.ladder.check.source import read
from ladder.check.hostile import code
from ladder.check.mistakes import RIGHT, changed

SECONDS = "600"
"""A limit against a hang; these files end by themselves."""


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Return the JSON object on the last line of the output."""
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def test_a_finding_is_printed_and_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says first that it runs the file."""
    file = tmp_path / "my head.py"
    file.write_text(changed("head_only.py", "torch.tril(", "torch.triu("), encoding="utf-8")
    assert main(["check", f"{file}:Head", "--rung", "3", "--seconds", SECONDS, "--json"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"check runs {file} in a process of its own, for at most 600 s"
    assert any(line.startswith("finding  Head: The mask hides the past") for line in out)
    report = json.loads(out[-1])
    assert [finding["name"] for finding in report["findings"]] == ["mask-side"]
    assert (report["rung"], report["guessed"]) == (3, False)


def test_a_right_file_gives_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    """And no findings."""
    assert main(["check", str(RIGHT / "head_only.py"), "--seconds", SECONDS, "--json"]) == 0
    assert last_line(capsys)["findings"] == []


def test_a_file_that_ends_the_process_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: nothing could be tested."""
    file = tmp_path / "hostile.py"
    file.write_text(code("exit-code"), encoding="utf-8")
    assert main(["check", str(file), "--seconds", SECONDS]) == 2
    assert capsys.readouterr().err == (f"bardlet: {file}: it ended the process with exit code 7 (loading the file); "
                                       "nothing could be tested\n")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("gone.py", None, "gone.py: no such file"), ("a.py", b"def f(:\n", "a.py:1: is not valid Python"),
    ("a.py", b"\xff\xfe", "is not UTF-8 text (byte 0)"), ("a.py", b"x = 1\0", "is not valid Python"),
    ("a.py", b"(" * 5000, "is not valid Python"), ("a.py", b"#" * 2_000_001, "is larger than 2 MB"),
    ("a.ipynb", b"[]", "is not a notebook"), ("a.ipynb", b"{", "is not a notebook")])
def test_a_file_that_cannot_be_read(name: str, content: bytes | None, message: str, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and no process."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["check", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("argv", [["check", "a.py", "--rung", "14"], ["check", "a.py", "--seconds", "0"]])
def test_a_wrong_command_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, too: 1 means findings."""
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("bardlet: ")


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A class body writes the environment into the name of a class."""
    monkeypatch.setenv("BARDLET_API_KEY", "secret")
    file = tmp_path / "a.py"
    file.write_text("import os, torch.nn as nn\nclass Head(nn.Module):\n"
                    "    os._exit(3 if 'BARDLET_API_KEY' in os.environ else 4)\n", encoding="utf-8")
    with pytest.raises(NotChecked, match="exit code 4"):
        run.check(file, seconds=float(SECONDS))


# ---------------------------------------------------------------------------------- a forged report


def verdict(report: dict[str, object], ended: str = "") -> Verdict:
    """Return the verdict of a report."""
    return run._verdict(report, ended, Path("a.py"), None)


def test_a_forged_report_is_cleaned() -> None:
    """Unknown mistakes, control characters, long texts, wrong types."""
    found = verdict({"done": True, "rung": 1e9, "guessed": "yes", "notes": ["\x1b[2J", 3, None], "untested": [1],
                     "passed": {"\x1b[31mred": ["o\nk", 4], "B": 7},
                     "findings": [{"name": "no-such"}, 5, {"name": "no-scale", "where": "\x1b]0;x\x07" * 99,
                                                           "detail": "\x1b[31m"}]})
    [finding] = found.findings
    assert (finding.name, finding.where, finding.detail) == ("no-scale", "the file", "")
    assert "\x1b" not in repr(found).replace("\\x1b", "\x1b") and found.rung == 8 and not found.guessed
    assert found.passed["B"] == []


@pytest.mark.parametrize("value", [b"[]", b"{", b"[" * 1000, b"nul", b"\xff", b'"' + b"x" * (2 << 20) + b'"'])
def test_a_report_that_is_none(value: bytes, tmp_path: Path) -> None:
    """It counts as no result."""
    (tmp_path / "report.json").write_bytes(value)
    assert run._read(tmp_path / "report.json") == {}
    with pytest.raises(NotChecked, match="it ended the process"):
        verdict({})


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_is_no_report(tmp_path: Path) -> None:
    """Otherwise a file could show others' files."""
    (tmp_path / "secret.json").write_text('{"done": true}', encoding="utf-8")
    (tmp_path / "report.json").symlink_to(tmp_path / "secret.json")
    assert run._read(tmp_path / "report.json") == {}


def test_findings_survive_the_end_of_the_process() -> None:
    """The report is written after each step."""
    found = verdict({"doing": "training GPT", "findings": [{"name": "no-crop", "where": "GPT", "detail": ""}]},
                    "it did not finish within 30 s")
    assert [finding.name for finding in found.findings] == ["no-crop"]
    assert found.ended == "it did not finish within 30 s (training GPT)"


def test_only_the_selected_part_runs(tmp_path: Path) -> None:
    """No loop, no call, no file is opened: only imports, classes, functions and constants are taken."""
    file = tmp_path / "a.py"
    file.write_text("import math\nn_embd = 6 * 64\nhead = n_embd // 2\nmodel = GPT().to(device)\n"
                    "text = open('x').read()\nprint(1)\nfor i in range(3):\n    y = i\n"
                    "if __name__ == '__main__':\n    n_layer = 12\n    main()\nx = [open(f) for f in 'ab']\n"
                    "def f():\n    pass\nfirst = lambda s: open(s)\nz = math.sqrt(4)\n", encoding="utf-8")
    kept = [__import__("ast").unparse(node).split("\n")[0] for node in read(file).selected.body]
    assert kept == ["import math", "n_embd = 48", "head = n_embd // 2", "n_layer = 2", "def f():",
                    "first = lambda s: open(s)", "z = math.sqrt(4)"]
