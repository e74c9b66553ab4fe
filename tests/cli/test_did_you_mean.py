"""A misspelled run is named, for every command that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bardlet.cli import main

COMMANDS = {"sample": [], "chat": [], "eval": [], "doctor": [], "resume": [], "translate": [], "sft": ["chats.jsonl"]}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three folders with a run.toml, one of them outside runs/."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/shakespeare-qwen3", "runs/my stories", "elsewhere/novels"):
        Path(name).mkdir(parents=True)
        Path(name, "run.toml").touch()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_a_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "runs/shakespear-qwen", *COMMANDS[command]]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "bardlet: runs/shakespear-qwen: no such folder; did you mean runs/shakespeare-qwen3?"


@pytest.mark.parametrize(("typed", "suggestion"), [
    ("shakespeare-qwen3", "did you mean runs/shakespeare-qwen3?"),
    ("Shakespeare-Qwen", "did you mean runs/shakespeare-qwen3?"),
    ("mystories", "did you mean 'runs/my stories'?"), ("elsewhere/novel", "did you mean elsewhere/novels?"),
    ("xyz", "`bardlet train` prints the path of its run folder"), ("no/such/folder", "`bardlet train` prints the path"),
])  # fmt: skip
def test_a_suggestion_is_a_run(typed: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", typed]) == 1
    assert f"{typed}: no such folder; {suggestion}" in capsys.readouterr().err


def test_init_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("a text " * 200)
    assert main(["train", "a.txt", "--init", "runs/my-stories", "--steps", "2"]) == 1
    assert "did you mean 'runs/my stories'?" in capsys.readouterr().err
