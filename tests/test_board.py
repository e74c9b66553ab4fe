"""Lines of results: the commit that they name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import record

# ---------------------------------------------------------------------------- commit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with benchmarks, their results and other files, in no checkout, that `record` takes for its own."""
    for name in ("benchmarks/results/board.jsonl", "benchmarks/README.md", "benchmarks/board.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(record, "HERE", tmp_path / "benchmarks")
    record.commit.cache_clear()
    yield tmp_path
    record.commit.cache_clear()


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
@pytest.mark.parametrize(("changed", "mark"), [
    ("benchmarks/results/board.jsonl", ""), ("benchmarks/README.md", ""), ("new.txt", ""),
    ("benchmarks/board.py", "+"), ("README.md", "+"),
])  # fmt: skip
def test_results_do_not_make_a_commit_another(changed: str, mark: str, folder: Path) -> None:
    """A line that was appended, the board, or a file of nobody's: what was measured is still the commit."""
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        settings = ("user.name=bard", "user.email=bard@example.org", "commit.gpgsign=false")
        subprocess.run(["git", *(word for one in settings for word in ("-c", one)), *words], cwd=folder, check=True)
    clean = record.commit()
    assert clean and len(clean) == 12 and "+" not in clean
    with open(folder / changed, "a") as file:
        file.write("second\n")
    record.commit.cache_clear()
    assert record.commit() == clean + mark


def test_without_a_checkout_there_is_no_commit(folder: Path) -> None:
    assert record.commit() is None

