"""Paths as people write them: `~`, names that are not UTF-8, and a user without a home folder."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from bardlet.cli import main
from bardlet.cli.training import RunOptions, config_file
from bardlet.config.paths import given
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
    folder = named.cache_folder()
    assert folder == named.cache_folder() and folder.name.startswith("bardlet-")
    assert len(caplog.records) == 1 and "BARDLET_CACHE" in caplog.text
