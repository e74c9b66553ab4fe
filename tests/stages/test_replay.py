"""--replay: the old text is found again, the losses on both texts are recorded, and the run resumes bit for bit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same_run
from processes import power_cut

from bardlet.cli import main
from bardlet.run import folder, metrics

SMALL = ["--batch-size", "5", "--log-every", "3", "--warmup-steps", "2", "--threads", "1", "--steps", "12",
         "--save-every", "4", "--eval-every", "4", "--dtype", "fp32", "--compile", "off"]  # fmt: skip
SHAPE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]
Bardlet = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model of old.txt, and new.txt."""
    path = tmp_path_factory.mktemp("replay")
    (path / "old.txt").write_text("".join(f"the {n} bards, two; of {n * 7 % 31} rivers\n" for n in range(200)))
    (path / "new.txt").write_text("".join(f"{n} ravens; {n * 3 % 17} towers, {n} bards\n" for n in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main(["train", "old.txt", *SHAPE, *SMALL, "--out", "base"]) == 0
    return path


@pytest.fixture
def texts(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_losses_are_measured(texts: Path, bardlet: Bardlet, capsys: pytest.CaptureFixture[str]) -> None:
    """Before training the old loss is the base's own; each evaluation, the record and the card have both."""
    base = folder.read_run(Path("base"))[1]
    summary = bardlet("train", "new.txt", "--init", "base", "--replay", "0.3", *SMALL, "--keep", "last", "--out", "r")
    record = folder.read_run(Path("r"))[1]
    assert record["old_val_loss_before"] == summary["old_val_loss_before"] == pytest.approx(base["val_loss"], abs=1e-6)
    evaluations = [line for line in metrics.read_metrics(Path("r")) if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert evaluations[-1]["old_val_loss"] == pytest.approx(record["old_val_loss"], abs=1e-6) == summary["old_val_loss"]
    card = Path("r/README.md").read_text()
    assert f"| validation loss on the old text, old (30 % of each batch) | {record['old_val_loss']:.4f} nats" in card
    assert main(["train", "--config", "r/run.toml", "--out", "again"]) == 0
    assert re.search(rf"replay: 30 % of each batch from the old text, old; .* {record['val_loss_before']:.4f} on new, "
                     rf"{base['val_loss']:.4f} on old\n", capsys.readouterr().out)
    assert_same_run(Path("r"), Path("again"), 12)


def test_replay_keeps_the_old_text(texts: Path, bardlet: Bardlet) -> None:
    """With half of each batch the old loss ends lower than without; `--replay 0` only measures it."""
    runs = {share: bardlet("train", "new.txt", "--init", "base", "--replay", share, *SMALL, "--keep", "last", "--out",
                           f"r{share}") for share in ("0", "0.5")}
    bardlet("train", "new.txt", "--init", "base", *SMALL, "--keep", "last", "--out", "plain")
    assert runs["0.5"]["old_val_loss"] < runs["0"]["old_val_loss"]
    assert_same_run(Path("plain"), Path("r0"), 12)
    assert "replay" not in Path("plain/run.toml").read_text()


@pytest.mark.parametrize("share", ["0.2", "0.33", "0.9"])
def test_a_resumed_run_is_the_same(share: str, texts: Path, bardlet: Bardlet) -> None:
    """Even if the base model is gone: the record names the old text."""
    job = ["train", "new.txt", "--init", "base", "--replay", share, *SMALL]
    bardlet(*job, "--out", "whole")
    power_cut([*job, "--out", "cut"], step=6)
    shutil.rmtree("base")
    assert bardlet("resume", "cut")["resumed_from"] == 4
    assert_same_run(Path("whole"), Path("cut"), 12)


def change(path: Path) -> None:
    path.write_text(path.read_text() + "one more bard\n")


@pytest.mark.parametrize(("damage", "more", "message"), [
    (lambda: Path("old.txt").unlink(), [], r"--replay 0\.2: the text of base cannot be read \(old\.txt: no such file.*"
     "name the text with --replay-text TEXT"),
    (lambda: change(Path("old.txt")), [], "the text old changed since base was trained on it; restore it, or name"),
    (lambda: Path("base/run.toml").unlink(), [], "base does not say which text it was trained on; name a text with"),
    (lambda: None, ["--replay-text", "older.txt"], "older.txt: no such file, folder or corpus"),
    (lambda: Path("tiny.txt").write_text("the bard " * 3), ["--replay-text", "tiny.txt"],
     "--replay: tiny: the training split has 24 tokens, too few"),
])  # fmt: skip
def test_a_text_that_is_not_there_is_one_line(damage: Callable[[], None], more: list[str], message: str, texts: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    damage()
    assert main(["train", "new.txt", "--init", "base", "--replay", "0.2", *more, *SMALL, "--out", "r"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and not Path("r").exists(), error


def test_a_named_old_text(texts: Path, bardlet: Bardlet, capsys: pytest.CaptureFixture[str]) -> None:
    """--replay-text replaces the text of the base, which may be a folder from elsewhere; resume checks its hash."""
    Path("base/run.toml").unlink()
    job = ["train", "new.txt", "--init", "base", "--replay", "0.2", "--replay-text", "old.txt", *SMALL]
    assert bardlet(*job, "--out", "r")["old_val_loss"] > 0
    power_cut([*job, "--out", "cut"], step=6)
    change(Path("old.txt"))
    capsys.readouterr()
    assert main(["resume", "cut"]) == 1
    assert "the text old changed since the run started; restore it" in capsys.readouterr().err
    assert main(["doctor", "cut"]) == 0
    assert "warning  text: old: changed since the run started" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["--replay", "0.2"], "--replay 0.2: it repeats the text of a trained model; name the model with --init DIR"),
    (["--init", "base", "--replay", "1"], "--replay 1: must be at least 0 and below 1"),
    (["--init", "base", "--replay", "nan"], "--replay nan: must be at least 0 and below 1"),
    (["--init", "base", "--replay-text", "old.txt"], "--replay-text old.txt: add the share of each batch"),
])  # fmt: skip
def test_settings_that_do_not_fit(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "new.txt", *argv]) == 1
    assert message in capsys.readouterr().err
