"""Twenty disks that fill up: a one-line error with path and bytes, and an exact resume on a larger disk."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from invariants.test_kills import JOB, command, outcome, whole  # noqa: F401 (a fixture)

from bardlet.run import checkpoint, hf

NEEDED = 5_000
"""Maximum disk use of the run JOB in kilobytes: three checkpoints, one of them being written, and the root."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs whose size can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("not allowed to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def bardlet(run: Path, text: Path) -> subprocess.CompletedProcess[str]:
    """Start or resume the run, and wait until it exits."""
    arguments = [sys.executable, "-m", "bardlet", *map(str, command(run, text))]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def litter(run: Path) -> list[str]:
    """Return the files with temporary names."""
    return [str(path) for path in run.rglob("*") if path.suffix == ".tmp" or path.name.startswith((".tmp", ".step"))]


@pytest.mark.parametrize("size", [NEEDED * part // 20 for part in range(1, 21)])
def test_run_on_a_small_disk(size: int, small_disk: Path, text: Path,
                             whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """The run fits, or fails with a one-line error; on a larger disk it resumes from its last checkpoint."""
    run = small_disk / "run"
    resize(small_disk, size)
    done = bardlet(run, text)
    if done.returncode:
        line = done.stderr.splitlines()[-1]
        assert re.fullmatch(rf"bardlet: {run}\S*: cannot be written: no space left on device: [\d,]+ bytes are needed, "
                            r"[\d,]+ are free; free some space, or choose another --out", line), done.stderr
        assert "Traceback" not in done.stderr
    if checkpoint.steps_saved(run):
        checkpoint.load(checkpoint.newest_intact(run))
        assert hf.read_folder(run)
        again = bardlet(run, text)  # the disk is still full
        assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith(f"bardlet: {run}"), again.stderr
    started = (run / "run.toml").exists()
    resize(small_disk, 4 * NEEDED)
    if done.returncode:
        again = bardlet(run, text)
        assert again.returncode == 0, again.stderr
        assert ("continuing after step" in again.stdout) == started, again.stdout
    assert litter(run) == []
    assert outcome(run) == whole[0]


def test_largest_disk_is_large_enough(small_disk: Path, text: Path) -> None:
    """The sizes range from one where nothing fits to one where the whole run fits."""
    resize(small_disk, NEEDED)
    run = small_disk / "run"
    assert subprocess.run([sys.executable, "-m", "bardlet", "train", text, "--out", run, *JOB]).returncode == 0
    used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert used > NEEDED * 1000 / 4, f"{used:,} bytes: the sizes are too large to test anything"
