"""Damage to any file of a run is detected: its name is in an error, or in a warning about the fallback.

tests/acceptance/test_damage.py damages 1,200 files.
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


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Flip a bit."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, rng: random.Random) -> bytes:
    """Truncate."""
    return content[: rng.randrange(len(content))]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """Fill a block with zeros."""
    at, length = rng.randrange(len(content)), rng.choice((1, 16, 512, 4096))
    return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps with two checkpoints."""
    from bardlet.cli import main

    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", str(text), "--out", str(run), *TINY, "--steps", "10", "--save-every", "5"]) == 0
    return run


def covered(run: Path) -> list[Path]:
    """Return the manifests at the root and of the newest checkpoint, and every file in them."""
    folders = run, checkpoint.steps_saved(run)[-1]
    return [folder / name for folder in folders
            for name in (*manifest.read_manifest(folder)["files"], manifest.MANIFEST)]


def detected(run: Path, path: Path, warnings: list[str]) -> bool:
    """Return True if reading `run` names the damaged `path` in an error, or falls back with a warning that names it."""
    warnings.clear()
    if path.parent == run:
        try:
            hf.read_folder(run)
        except BardletError as error:
            return str(path) in str(error)
        return any(path.name in line for line in warnings)  # a missing manifest
    fell_back = checkpoint.newest_intact(run) != path.parent
    # another folder's manifest is intact itself, but the files in it are missing here
    name = str(path if path.name != manifest.MANIFEST else path.parent)
    return fell_back and any(name in line for line in warnings)


@pytest.fixture
def warnings() -> Any:
    """The log messages of bardlet during a test."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Collect(), logging.getLogger("bardlet")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def undetected(run: Path, kind: Damage, times: int, rng: random.Random, warnings: list[str]) -> list[str]:
    """Damage and restore `times` files of a run, one after another; return those whose damage was not detected."""
    missed, paths = [], covered(run)
    for number in range(times):
        path = paths[number % len(paths)]
        content = damaged = path.read_bytes()
        while damaged == content:  # zeros may replace zeros
            damaged = kind(content, rng)
        path.write_bytes(damaged)
        if not detected(run, path, warnings):
            missed.append(f"{path}: {kind.__name__}, {len(damaged)} of {len(content)} bytes")
        path.write_bytes(content)
        assert hf.read_folder(run) and checkpoint.newest_intact(run) == checkpoint.steps_saved(run)[-1], "not restored"
    return missed


@pytest.mark.parametrize("kind", [flipped, cut, zeroed], ids=lambda kind: kind.__name__)
def test_damage_is_detected(kind: Damage, finished: Path, tmp_path: Path, warnings: list[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert undetected(run, kind, 40, random.Random(1), warnings) == []


def test_missing_and_swapped_files_are_detected(finished: Path, tmp_path: Path, warnings: list[str]) -> None:
    """Each file is missing, or has the content of each other file; an intact folder is never refused."""
    run = shutil.copytree(finished, tmp_path / "run")
    contents = {path: path.read_bytes() for path in covered(run)}
    for path, content in contents.items():
        path.unlink()
        assert detected(run, path, warnings), f"{path}: missing"
        for other, foreign in contents.items():
            if foreign != content:
                path.write_bytes(foreign)
                assert detected(run, path, warnings), f"{path}: content of {other}"
        path.write_bytes(content)
        assert hf.read_folder(run)
