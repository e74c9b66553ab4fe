"""Checkpoints, metrics and the lock of a run folder: atomic writes, and damage detected by file."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from conftest import TINY

from bardlet.cli import main
from bardlet.errors import BardletError
from bardlet.run import checkpoint, lock, metrics
from bardlet.run import folder as run_folder
from bardlet.runtime import manifest


def saved(run: Path, step: int, keep: int = 9) -> Path:
    weights = {"w": torch.full((3, 2), float(step))}
    return checkpoint.save(run, step, weights, {"rng": torch.arange(step)}, {"seconds": 1.5}, keep)


def test_load_returns_what_save_wrote(tmp_path: Path) -> None:
    """Weights, state and metadata; the checkpoint is intact."""
    folder = saved(tmp_path, 7)
    assert manifest.damaged_files(folder) is None
    (weights, state), metadata = checkpoint.load(folder), manifest.read_json(folder / "trainer.json")
    assert torch.equal(weights["w"], torch.full((3, 2), 7.0)) and torch.equal(state["rng"], torch.arange(7))
    assert metadata == {"step": 7, "seconds": 1.5}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-00000007"], "a temporary file is left"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        saved(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps_saved(tmp_path)] == ["step-00000002", "step-00000010"]


def test_falling_back_abandons_later_checkpoints(tmp_path: Path) -> None:
    """20 is damaged and the run continues from 10: its next checkpoint is kept, and 20 is removed."""
    for step in (10, 20):
        saved(tmp_path, step, keep=2)
    (tmp_path / "checkpoints" / "step-00000020" / "trainer.json").write_text("{}")
    assert checkpoint.newest_intact(tmp_path).name == "step-00000010"
    saved(tmp_path, 12, keep=1)
    assert [p.name for p in checkpoint.steps_saved(tmp_path)] == ["step-00000012"]


def test_partial_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """A partial checkpoint and a partial file at the root are removed; everything else is kept."""
    kept = saved(tmp_path, 10)
    (tmp_path / "checkpoints" / ".step-00000020.77.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step-00000020.77.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".run.toml.77.tmp").write_text("half")
    (tmp_path / ".tmpmine").mkdir()
    (tmp_path / "run.toml").write_text("")
    run_folder.remove_partial(tmp_path)
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmpmine", "checkpoints", "run.toml"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_its_checkpoint_skipped(name: str, damage: str, tmp_path: Path,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    """Flip a bit of any file, cut it in half or remove it: the previous checkpoint is used, and the file is named."""
    good, bad = saved(tmp_path, 5), saved(tmp_path, 6)
    path = bad / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(flipped if damage == "flip" else content[:middle])
    logging.getLogger("bardlet").propagate = True
    assert checkpoint.newest_intact(tmp_path) == good
    assert str(path) in caplog.text


def test_no_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    (saved(tmp_path, 5) / "manifest.json").unlink()
    with pytest.raises(BardletError, match=r"no intact checkpoint \(.*\); start over with"):
        checkpoint.newest_intact(tmp_path)


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up during a save: the previous checkpoint is intact, and no temporary file is left."""
    good = saved(tmp_path, 5)

    def full(*args: object, **facts: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_manifest", full)
    with pytest.raises(BardletError, match=r"no space left on device: [\d,]+ bytes are needed, [\d,]+ are free"):
        saved(tmp_path, 6)
    assert checkpoint.newest_intact(tmp_path) == good
    assert [p.name for p in good.parent.iterdir()] == [good.name]


def test_a_damaged_line_of_metrics_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each line has a CRC. A partial last line, which a kill leaves, is skipped silently; any other with a warning."""
    for step in (1, 2, 3):
        metrics.append_metrics(tmp_path, {"step": step, "train_loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2, 3]
    path.write_text(text[:-10])
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2]
    assert not caplog.messages
    path.write_text(text.replace("0.5", "0.4"))
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 3]
    assert caplog.messages == [f"{path}: line 2 is damaged; skipping it"]


def test_metrics_are_cut_after_a_step(tmp_path: Path) -> None:
    """Later lines are removed, earlier ones keep every byte."""
    for step in (1, 2, 3):
        metrics.append_metrics(tmp_path, {"step": step, "train_loss": 0.1 * step})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in metrics.cut_metrics(tmp_path, 2)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:2]


def test_a_locked_folder_names_its_holder(tmp_path: Path) -> None:
    """Locking it twice is an error with the holder's pid; after the release it can be locked again."""
    with (lock.locked(tmp_path), pytest.raises(BardletError, match=r"in use by process \d+ on"),
          lock.locked(tmp_path)):
        pass
    with lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_one_line(number: int, text: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """NFS without its lock service, FUSE. For ENOSYS the library would use a soft lock, which outlives its holder."""
    fcntl = pytest.importorskip("fcntl")

    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BardletError, match="cannot lock files"), lock.locked(tmp_path):
        pass
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"bardlet: {tmp_path / 'run'}: its file system cannot lock files ({os.strerror(number)}), as some network "
        "drives cannot; use a folder on a local disk, or have the drive mounted with locks"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EPERM])
def test_another_error_of_a_lock_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BardletError, match=f"cannot be written .{os.strerror(number)}"), lock.locked(tmp_path):
        pass
