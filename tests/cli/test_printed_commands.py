"""Printed commands can be pasted into a shell, whatever the names in them."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY

from bardlet import errors
from bardlet.cli import main
from bardlet.errors import quoted

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")
NAMES = ["my run (é)", "it's \"so\"", "诗 🎉", "-x", "a  b", "$HOME;rm", "--tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_name_is_one_word(name: str) -> None:
    """A leading dash would make it a flag."""
    word, folder = shlex.split(f"{quoted(name)} {quoted(Path('runs') / name)}")
    assert word == (f"./{name}" if name.startswith("-") else name) and folder == f"runs/{name}"


def test_windows_has_double_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "sys", SimpleNamespace(platform="win32"))
    assert [quoted(name) for name in ("a b", "ab", "it's")] == ['"a b"', "ab", "it's"]


@pytest.mark.parametrize("name", ["my run (é)", "it's  \"诗\"", "-x"])
def test_the_commands_of_a_run_work(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """https://github.com/PathVisio/pathvisio/issues/110: after training, for a second start, and in the card."""
    monkeypatch.chdir(tmp_path)
    argv = ["train", str(text), f"--out={name}", *TINY, "--steps", "2"]
    assert main(argv) == 0
    output = capsys.readouterr()
    [command] = re.findall(r"; try `(bardlet sample .*)`; loss curve", output.out)
    assert "Glyph" not in output.err
    assert main([*shlex.split(command)[1:], "--tokens", "3"]) == 0
    assert main(argv) == 1
    [command] = re.findall(r"continue it \(`(bardlet resume .*)`\)", capsys.readouterr().err)
    assert main(shlex.split(command)[1:]) == 1
    again = re.findall(r"`(bardlet train .* --init .*)`", error := capsys.readouterr().err)
    assert "all 2 steps are done" in error and Path(shlex.split(again[0])[-1]) == Path(name)
    assert shlex.split(again[0])[2] == str(text), "not on the default text"
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    folders = {ast.literal_eval(found) for found in re.findall(r"from_pretrained\((.*)\)\n", card)}
    assert folders == {f"path/to/{name}"}
    assert f"path/to/{name}" in shlex.split(re.findall(r"`(bardlet sample .*)`, or", card)[0])
