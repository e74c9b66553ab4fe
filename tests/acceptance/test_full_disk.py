"""A disk that fills up, at twenty sizes: one line with path and bytes; the last checkpoint loads; the rest is exact."""

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
"""Kilobytes that the run of JOB takes on a disk at most: three checkpoints, one of them in the making, and the root."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, whose size can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def bardlet(run: Path, text: Path) -> subprocess.CompletedProcess[str]:
    """The command that begins the run, or goes on with it, at its end."""
    words = [sys.executable, "-m", "bardlet", *map(str, command(run, text))]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def litter(run: Path) -> list[str]:
    """Files that are temporary by their names."""
    return [str(path) for path in run.rglob("*") if path.suffix == ".tmp" or path.name.startswith((".tmp", ".step"))]


@pytest.mark.parametrize("size", [NEEDED * part // 20 for part in range(1, 21)])
def test_a_disk_of_so_many_kilobytes(size: int, small_disk: Path, text: Path,
                                     whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """The run ends with one line, or fits; on a larger disk it goes on from its last checkpoint."""
    run = small_disk / "run"
    resize(small_disk, size)
    done = bardlet(run, text)
    if done.returncode:
        line = done.stderr.splitlines()[-1]
        assert re.fullmatch(rf"bardlet: {run}\S*: cannot be written: no space left on device: [\d,]+ bytes are needed, "
                            r"[\d,]+ are free; free some space, or choose another --out", line), done.stderr
        assert "Traceback" not in done.stderr
    if checkpoint.steps_saved(run):
        checkpoint.load(checkpoint.newest_whole(run))
        assert hf.read_folder(run)
        again = bardlet(run, text)  # still as full
        assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith(f"bardlet: {run}"), again.stderr
    begun = (run / "run.toml").exists()
    resize(small_disk, 4 * NEEDED)
    if done.returncode:
        again = bardlet(run, text)
        assert again.returncode == 0, again.stderr
        assert ("continuing after step" in again.stdout) == begun, again.stdout
    assert litter(run) == []
    assert outcome(run) == whole[0]


def test_the_largest_is_large_enough(small_disk: Path, text: Path) -> None:
    """The sizes reach from one where nothing fits to one where all does."""
    resize(small_disk, NEEDED)
    run = small_disk / "run"
    assert subprocess.run([sys.executable, "-m", "bardlet", "train", text, "--out", run, *JOB]).returncode == 0
    used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert used > NEEDED * 1000 / 4, f"{used:,} bytes: the sizes are too large to tell anything"
