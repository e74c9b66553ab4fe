"""Two runs started on one folder at once, fifty times: one runs; the other names it, exits and leaves no trace."""

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


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start `bardlet ARGUMENTS` in its own process."""
    return subprocess.Popen([sys.executable, "-m", "bardlet", *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("seed", range(50))
def test_two_runs_on_one_folder(seed: int, text: Path, tmp_path: Path,
                                whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """Even seeds: two `train` into one folder. Odd seeds: two `resume` of one run."""
    run, chance = tmp_path / "run", random.Random(seed)
    arguments: list[str | Path] = ["train", text, "--out", run, *JOB]
    if seed % 2:
        first = start(*arguments, "--save-every", "10")
        while not (run / "checkpoints" / "step-00000010").exists() and first.poll() is None:
            time.sleep(0.001)
        first.kill()
        first.communicate()
        arguments = ["resume", run]
    pair = [start(*arguments)]
    time.sleep(chance.choice((0, chance.uniform(0, 0.2), chance.uniform(0, 2))))
    pair.append(start(*arguments))
    ended: list[subprocess.Popen[str]] = []
    while len(ended) < 2:
        ended += [process for process in pair if process not in ended and process.poll() is not None]
        time.sleep(0.005)
    outputs = [process.communicate(timeout=600)[0] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1], outputs
    winner, loser = sorted(zip(pair, outputs, strict=True), key=lambda item: item[0].returncode)
    late = r"already contains a run|all its 60 steps are done"
    names = rf"in use by process {winner[0].pid} on \S+ since [-\d]+ [:\d]+; wait for it to finish, or stop it"
    last = loser[1].splitlines()[-1]
    assert re.search(names, last) or (ended[0] is winner[0] and re.search(late, last)), loser[1]
    assert read_toml(run / "run.toml")[1]["finished"]
    assert outcome(run) == whole[0]
