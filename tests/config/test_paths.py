"""Paths as people write them: `~`, names that are not UTF-8, and a user without a home folder."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import platformdirs
import pytest

from bardlet.api import arguments
from bardlet.cli import main
from bardlet.cli.parser import parse
from bardlet.cli.training import RunOptions, config_file
from bardlet.config.finetuning import GRPOConfig
from bardlet.config.paths import given, given_reward, shown
from bardlet.config.pretraining import TrainConfig, TranslationConfig
from bardlet.config.toml import read_toml
from bardlet.data import named
from bardlet.errors import BardletError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_in_every_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/huggingface/transformers/issues/10628"""
    assert TrainConfig(text=("~/a.txt",), init="~/base").text == (f"{home}/a.txt",)
    assert TrainConfig(init="~/base").init == f"{home}/base"
    assert TranslationConfig(source="~/a.de", target="~/a.en").target == f"{home}/a.en"
    assert RunOptions(out="~/run").out == f"{home}/run"
    assert config_file(["--config=~/a.toml"]) == home / "a.toml"
    (home / "a.toml").write_text('text = ["~/a.txt"]\n')
    assert read_toml(home / "a.toml")[0].text == (f"{home}/a.txt",)
    for name, folder in (("BARDLET_CACHE", named.cache_folder), ("BARDLET_DATA", lambda: named.locate("names"))):
        monkeypatch.setenv(name, "~/folder")
        (home / "folder" / "names").mkdir(parents=True, exist_ok=True)
        for file in ("female.txt", "male.txt"):
            (home / "folder" / "names" / file).touch()
        assert str(folder()).startswith(f"{home}/folder")


def test_a_run_in_a_tilde_folder_is_in_the_home_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (home / "a.txt").write_text("to be or not to be. " * 200)
    assert main(["train", "~/a.txt", "--out=~/my run", "--n-layer", "1", "--n-head", "1", "--n-embd", "16",
                 "--block-size", "16", "--steps", "2", "--compile", "off", "--debug"]) == 0  # fmt: skip
    assert (home / "my run" / "run.toml").is_file() and not (tmp_path / "~").exists()
    assert f"'{home}/my run'" in capsys.readouterr().out  # a command that can be pasted


def test_a_name_that_is_not_utf8_is_refused_by_name() -> None:
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    with pytest.raises(BardletError, match=r"caf\\xe9\.txt: the name is not valid UTF-8; rename the file"):
        given(name)
    for use in (lambda: TrainConfig(text=(name,)), lambda: RunOptions(out=name)):
        with pytest.raises(BardletError, match="rename the file"):
            use()


def test_without_a_home_folder_the_cache_is_a_temporary_one(monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    """https://github.com/pytorch/pytorch/issues/140765"""
    def fail(name: str) -> str:
        raise RuntimeError("could not determine the home directory for '~/.cache'")

    monkeypatch.setattr(platformdirs, "user_cache_dir", fail)
    monkeypatch.delenv("BARDLET_CACHE", raising=False)
    named._note_once.cache_clear()
    named._temporary_cache.cache_clear()
    folder = named.cache_folder()
    assert folder == named.cache_folder() and folder.name.startswith("bardlet-")
    assert len(caplog.records) == 1 and "BARDLET_CACHE" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="user ids of POSIX")
@pytest.mark.parametrize("planted", ["link", "writable", "file"])
def test_the_temporary_cache_is_never_a_folder_that_others_can_fill(planted: str, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code in the cache is run."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    named._temporary_cache.cache_clear()
    folder = tmp_path / f"bardlet-{os.getuid()}"
    if planted == "link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    elif planted == "writable":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        folder.touch()
    mine = named._temporary_cache()
    assert mine != folder and mine.parent == tmp_path and mine.stat().st_mode & 0o777 == 0o700
    named._temporary_cache.cache_clear()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the user have no HOME, and a user id that the system does not know."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "BARDLET_CACHE", "BARDLET_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    named._note_once.cache_clear()
    named._temporary_cache.cache_clear()


@pytest.mark.parametrize("argv", [
    ["train", "a.txt", "--out", "run", "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "16",
     "--steps", "2", "--compile", "off", "--debug"],
    ["data", "--debug"], ["data", "--json", "--debug"], ["doctor", "--debug"],
    ["train", "a.txt", "--plan", "--steps", "2", "--debug"],
])  # fmt: skip
@pytest.mark.usefixtures("homeless")
def test_every_command_works_without_a_home_folder(argv: list[str], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/h2oai/h2o-llmstudio/pull/974"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be. " * 200)
    assert main(argv) == 0


@pytest.mark.parametrize("path", ["~", "~/run", "~/a/b.txt"])
@pytest.mark.usefixtures("homeless")
def test_a_tilde_without_a_home_folder_makes_no_folder_of_that_name(path: str, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BardletError, match=f"^{path}: this user has no home folder for ~; set HOME"):
        given(path)
    assert main(["train", f"--out={path}", "--steps", "2"]) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["~b.txt", "a~", "a/~/b", "~nobody-has-this-name/a"])
def test_a_tilde_that_is_part_of_a_name_stays(path: str) -> None:
    assert given(path) == path


@pytest.mark.parametrize(("path", "expected"), [
    ("{home}/data/names", "~/data/names"), ("{home}2/names", "{home}2/names"), ("/data{home}/x", "/data{home}/x")])
def test_only_a_path_inside_the_home_folder_is_shown_with_a_tilde(path: str, expected: str, home: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(path.format(home=home)) == expected.format(home=home)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("USERPROFILE", "/")
    assert shown("/data/names") == "/data/names"


@pytest.mark.parametrize(("argv", "code", "message"), [
    (["data"], 0, "names"), (["doctor", "--json"], 0, "BARDLET_CACHE"),
    (["train", "a.txt", "--plan", "--steps", "2"], 1, "set BARDLET_CACHE to another folder"),
    (["sft", "a", "a.jsonl"], 1, "a: no such folder"),
])  # fmt: skip
def test_a_home_folder_that_cannot_be_written(argv: list[str], code: int, message: str, home: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """https://github.com/i-am-bee/agentstack/pull/611: a file in its place, into which not even root writes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be. " * 200)
    monkeypatch.delenv("BARDLET_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home.rmdir()
    home.touch()
    assert main(argv) == code
    output = capsys.readouterr()
    assert message in output.out + output.err and "internal error" not in output.err


@pytest.mark.parametrize(("command", "argv", "name"), [
    ("eval", ["run", "--source=~/x", "--target=~/x"], "source"), ("eval", ["~/x"], "run"),
    ("eval", ["run", "--target=~/x"], "target"), ("runs", ["--root=~/x"], "root"),
    ("translate", ["run", "--attention=~/x"], "attention"), ("sample", ["~/x"], "run"),
    ("ladder", ["--out=~/x"], "out"), ("doctor", ["~/x"], "run"), ("chat", ["~/x"], "run"),
])  # fmt: skip
def test_a_tilde_in_every_path_of_a_command(command: str, argv: list[str], name: str, home: Path) -> None:
    module = importlib.import_module(f"bardlet.cli.{command}")
    assert getattr(parse(module.Command, argv, module.USAGE), name) in (f"{home}/x", (f"{home}/x",))


@pytest.mark.parametrize("path", ["~/x", "~", "~/a b/ü"])
def test_a_tilde_in_python(path: str, home: Path) -> None:
    assert arguments.path(path, "f: a") == arguments.path(Path(path), "f: a") == path.replace("~", str(home))
    assert arguments.paths([[path], "b"], "f: a") == (path.replace("~", str(home)), "b")


@pytest.mark.parametrize(("reward", "expected"), [
    ("~/judge", "{home}/judge"), ("~/score.py --strict", "{home}/score.py --strict"), ("exact", "exact"),
    ("~/my$score.py ~", "'{home}/my$score.py' ~"), ("python ~/score.py", "python ~/score.py"),
])  # fmt: skip
def test_a_tilde_in_a_reward(reward: str, expected: str, home: Path) -> None:
    """A folder, or the program of a command, whose other words are its own affair."""
    (home / "judge").mkdir()
    assert GRPOConfig(reward=reward).reward == given_reward(reward) == expected.format(home=home)
    assert GRPOConfig(reward=expected.format(home=home)).reward == expected.format(home=home)


@pytest.mark.parametrize(("raw", "readable"), [
    (b"caf\xe9.txt", r"caf\\xe9\.txt"), (b"\x82\xa0/b.jsonl", r"\\x82\\xa0/b\.jsonl"), (b"a\xff", r"a\\xff")])
def test_names_in_other_encodings_are_refused_by_name(raw: bytes, readable: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """https://github.com/huggingface/datasets/issues/7468: Latin-1, Shift-JIS, and no encoding at all."""
    monkeypatch.chdir(tmp_path)
    name = raw.decode("utf-8", "surrogateescape")
    for argv in (["train", name], ["train", "names", f"--out={name}"], ["train", f"--init={name}"], ["sample", name],
                 ["resume", name], ["sft", "base", name], ["eval", "run", name], ["doctor", name], ["runs", name],
                 ["eval", "run", f"--source={name}"], ["train", f"--config={name}"]):
        assert main(argv) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"bardlet: {readable}: the name is not valid UTF-8; rename the file", line), argv
    assert not list(tmp_path.iterdir())
