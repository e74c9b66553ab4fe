"""`bardlet train ... | head -c N` at twenty random bytes, and a full disk behind the output, in real processes."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from invariants.test_kills import command, outcome, whole  # noqa: F401 (a fixture)

from bardlet.run import checkpoint


def train(run: Path, text: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Start or resume the run with its output in `head -c SIZE`."""
    process = subprocess.Popen([sys.executable, "-m", "bardlet", *map(str, command(run, text))],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    head = subprocess.run(["head", "-c", str(size)], stdin=process.stdout, capture_output=True, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()
    error = process.stderr.read()
    return subprocess.CompletedProcess(process.args, process.wait(), head.stdout, error)


@pytest.mark.skipif(sys.platform == "win32", reason="needs head")
@pytest.mark.parametrize("seed", range(4))
def test_head_at_random_bytes(seed: int, text: Path, tmp_path: Path,
                              whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """Five closed pipes: no step that was shown is lost, and the finished run has the bits of an undisturbed one."""
    chance = random.Random(seed)
    for attempt in range(5):
        run = tmp_path / f"{attempt}"
        done = train(run, text, chance.randrange(300, 1200))
        shown = max(map(int, re.findall(r"step +(\d+)/", done.stdout)), default=0)
        assert done.returncode in (0, 141) and "Traceback" not in done.stderr, done.stderr
        if run.exists():
            assert int(checkpoint.newest_intact(run).name[5:]) >= shown
        else:
            assert shown == 0
        while not run.exists() or "finished = true" not in (run / "run.toml").read_text():
            assert train(run, text, 1_000_000).returncode == 0
        assert outcome(run) == whole[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [["train", "{text}", "--steps", "2", "--out", "{run}"], ["doctor"], ["--help"]])
def test_dev_full_is_one_line(argv: list[str], text: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = [word.format(text=text, run=tmp_path / "run") for word in argv]
        done = subprocess.run([sys.executable, "-m", "bardlet", *arguments], stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("bardlet: no space left on device") and "Trace" not in done.stderr
