"""A thousand flipped bits, a hundred cuts and a hundred zeroed blocks in a run's files; two hundred intact folders."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from invariants.test_damage import Damage, cut, finished, flipped, undetected, warnings, zeroed  # noqa: F401 (fixtures)

from bardlet.run import checkpoint, hf


@pytest.mark.parametrize(("kind", "times"), [(flipped, 1000), (cut, 100), (zeroed, 100)])
def test_damage_is_detected(kind: Damage, times: int, finished: Path, tmp_path: Path,  # noqa: F811
                            warnings: list[str]) -> None:  # noqa: F811
    """Every corruption is detected."""
    run = shutil.copytree(finished, tmp_path / "run")
    assert undetected(run, kind, times, random.Random(7), warnings) == []


def test_intact_folders_are_accepted(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two hundred copies are read without an error."""
    for number in range(200):
        run = shutil.copytree(finished, tmp_path / str(number))
        assert hf.read_folder(run) and checkpoint.newest_intact(run).name == "step-00000010"
        shutil.rmtree(run)
