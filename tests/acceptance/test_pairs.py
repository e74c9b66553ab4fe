"""Fifty times two runs are started on one folder at once: one runs, the other names it and leaves no trace."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invariants.test_kills import JOB, outcome, whole  # noqa: F401 (a fixture)

from bardlet.config.toml import read_toml


def begin(*words: str | Path) -> subprocess.Popen[str]:
    """`bardlet WORDS` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "bardlet", *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("seed", range(50))
def test_a_pair(seed: int, text: Path, tmp_path: Path, whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """Two that train into one folder (even seeds), or two that resume one run (odd ones)."""
    run, chance = tmp_path / "run", random.Random(seed)
    words: list[str | Path] = ["train", text, "--out", run, *JOB]
    if seed % 2:
        first = begin(*words, "--save-every", "10")
        while not (run / "checkpoints" / "step-00000010").exists() and first.poll() is None:
            time.sleep(0.001)
        first.kill()
        first.communicate()
        words = ["resume", run]
    pair = [begin(*words)]
    time.sleep(chance.choice((0, chance.uniform(0, 0.2), chance.uniform(0, 2))))
    pair.append(begin(*words))
    ended: list[subprocess.Popen[str]] = []
    while len(ended) < 2:
        ended += [process for process in pair if process not in ended and process.poll() is not None]
        time.sleep(0.005)
    said = [process.communicate(timeout=600)[0] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1], said
    winner, loser = sorted(zip(pair, said, strict=True), key=lambda one: one[0].returncode)
    late = r"already contains a run|all its 60 steps are done"
    names = rf"in use by process {winner[0].pid} on \S+ since [-\d]+ [:\d]+; wait for it to finish, or stop it"
    last = loser[1].splitlines()[-1]
    assert re.search(names, last) or (ended[0] is winner[0] and re.search(late, last)), loser[1]
    assert read_toml(run / "run.toml")[1]["finished"]
    assert outcome(run) == whole[0]
