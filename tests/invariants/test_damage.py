"""Damage to a run: any bit, half a file, zeros, a file that is gone or another's, is refused by name, or gone round.

tests/acceptance/test_damage.py does it 1,200 times.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from bardlet.errors import BardletError
from bardlet.run import checkpoint, hf
from bardlet.runtime import manifest

Damage = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    """The end is missing."""
    return content[: chance.randrange(len(content))]


def zeroed(content: bytes, chance: random.Random) -> bytes:
    """A block of the disk is zero."""
    at, length = chance.randrange(len(content)), chance.choice((1, 16, 512, 4096))
    return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps with two checkpoints."""
    from bardlet.cli import main

    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(text), "--out", str(run), *TINY, "--steps", "10", "--save-every", "5"]) == 0
    return run


def covered(run: Path) -> list[Path]:
    """Every file that a manifest knows, and the manifests; of the checkpoints the newest's."""
    folders = run, checkpoint.steps_saved(run)[-1]
    return [folder / name for folder in folders
            for name in (*manifest.read_manifest(folder)["files"], manifest.MANIFEST)]


def seen(run: Path, path: Path, said: list[str]) -> bool:
    """Whether what was done to `path` is refused with its name, or gone round with a notice that has it."""
    said.clear()
    if path.parent == run:
        try:
            hf.read_folder(run)
        except BardletError as error:
            return str(path) in str(error)
        return any(path.name in line for line in said)  # a manifest that is gone
    gone_round = checkpoint.newest_whole(run) != path.parent
    # another folder's manifest is whole itself: it is the files it knows that are not there
    return gone_round and any(str(path if path.name != manifest.MANIFEST else path.parent) in line for line in said)


@pytest.fixture
def said() -> Any:
    """What the library says while a test runs."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear, logger = Ear(), logging.getLogger("bardlet")
    logger.addHandler(ear)
    yield lines
    logger.removeHandler(ear)


def unseen(run: Path, kind: Damage, times: int, chance: random.Random, said: list[str]) -> list[str]:
    """Damage `times` files of a run in turn, each made whole again: those where nothing was seen."""
    missed, paths = [], covered(run)
    for number in range(times):
        path = paths[number % len(paths)]
        content = damaged = path.read_bytes()
        while damaged == content:  # zeros where there were zeros
            damaged = kind(content, chance)
        path.write_bytes(damaged)
        if not seen(run, path, said):
            missed.append(f"{path}: {kind.__name__}, {len(damaged)} of {len(content)} bytes")
        path.write_bytes(content)
        assert hf.read_folder(run) and checkpoint.newest_whole(run) == checkpoint.steps_saved(run)[-1], "whole again"
    return missed


@pytest.mark.parametrize("kind", [flipped, cut, zeroed], ids=lambda kind: kind.__name__)
def test_damage_is_seen(kind: Damage, finished: Path, tmp_path: Path, said: list[str]) -> None:
    """Forty times each."""
    run = shutil.copytree(finished, tmp_path / "run")
    assert unseen(run, kind, 40, random.Random(1), said) == []


def test_files_that_are_gone_or_in_anothers_place_are_seen(finished: Path, tmp_path: Path, said: list[str]) -> None:
    """Each file missing; each in the place of each other; and whole folders are never refused."""
    run = shutil.copytree(finished, tmp_path / "run")
    contents = {path: path.read_bytes() for path in covered(run)}
    for path, content in contents.items():
        path.unlink()
        assert seen(run, path, said), f"{path}: missing"
        for other, foreign in contents.items():
            if foreign != content:
                path.write_bytes(foreign)
                assert seen(run, path, said), f"{other} in the place of {path}"
        path.write_bytes(content)
        assert hf.read_folder(run)
