"""Lines of results: their commit, the board built from them, and nanoGPT's figures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from bardlet.runtime import device

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import board
import record
import vs_nanogpt

# ---------------------------------------------------------------------------- commit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder outside of a checkout, with benchmarks, results and other files, that `record` uses as its own."""
    for name in ("benchmarks/results/board.jsonl", "benchmarks/README.md", "benchmarks/board.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(record, "HERE", tmp_path / "benchmarks")
    record.commit.cache_clear()
    yield tmp_path
    record.commit.cache_clear()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
@pytest.mark.parametrize(("changed", "mark"), [
    ("benchmarks/results/board.jsonl", ""), ("benchmarks/README.md", ""), ("new.txt", ""),
    ("benchmarks/board.py", "+"), ("README.md", "+"),
])  # fmt: skip
def test_new_results_do_not_mark_the_commit_as_changed(changed: str, mark: str, folder: Path) -> None:
    """Only changes to tracked files other than results and the board add a `+`."""
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        settings = ("user.name=bard", "user.email=bard@example.org", "commit.gpgsign=false")
        subprocess.run(["git", *(word for setting in settings for word in ("-c", setting)), *arguments], cwd=folder,
                       check=True)
    clean = record.commit()
    assert clean and len(clean) == 12 and "+" not in clean
    with open(folder / changed, "a") as file:
        file.write("second\n")
    record.commit.cache_clear()
    assert record.commit() == clean + mark


def test_no_commit_outside_a_checkout(folder: Path) -> None:
    assert record.commit() is None


# ---------------------------------------------------------------------------- the board


def line(seed: int, loss: float, **more: Any) -> dict[str, Any]:
    """Return a line of results/board.jsonl in its oldest format."""
    return {"class": "2-core CPU, 1 minute", "text": "rhyme", "arguments": ["rhyme", "--steps", "9"], "commit": "c0ffe",
            "machine": {"processor": "A CPU"}, "seed": seed, "loss": loss, "seconds": 1.0, "whole": 2.0,
            "parameters": 10**6, "block_size": 64, "selected_by": "last", "dtype": "bf16", "compiled": False,
            "threads": 2, **more}  # fmt: skip


def rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the board's rows, without the table headers."""
    table = [text for text in board.page(lines).splitlines() if text.startswith("| ") and text[2].isdigit()]
    return [[cell.strip() for cell in text.strip("|").split("|")] for text in table]


def test_each_seed_counts_once() -> None:
    """Only its newest line counts. Other arguments and machines have their own rows. The lowest loss comes first."""
    lines = [line(1, 9.0), line(2, 2.0), line(1, 1.0), line(1, 3.0, arguments=["rhyme"]),
             line(1, 0.5, machine={"processor": "Another CPU", "native": "bf16"})]
    cells = rows(lines)
    assert [row[:2] for row in cells] == [["0.5000", "1"], ["1.5000 ± 0.7071", "2"], ["3.0000", "1"]]
    assert [row[-1] for row in cells] == ["`bardlet train rhyme --steps 9`"] * 2 + ["`bardlet train rhyme`"]
    assert [row[7] for row in cells] == [f"{name}, 2 threads, bf16" for name in ("Another CPU", "A CPU", "A CPU")]


def test_each_text_and_class_has_a_table() -> None:
    page = board.page([line(1, 1.0), line(1, 1.0, text="verse"), line(1, 1.0, **{"class": "one GPU"})])
    headings = [text for text in page.splitlines() if text.startswith("## ")]
    assert headings == ["## 2-core CPU, 1 minute: rhyme", "## 2-core CPU, 1 minute: verse", "## one GPU: rhyme"]


def test_machine_is_the_gpu_of_a_gpu_run() -> None:
    """The row names the GPU, not the CPU."""
    [row] = rows([line(1, 1.0, device="cuda", processor="NVIDIA H100 80GB HBM3", compiled=True)])
    assert row[7] == "NVIDIA H100 80GB HBM3, bf16, compiled"


def test_run_metadata_names_the_device(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    bardlet("train", text, "--out", tmp_path / "run", *TINY, "--steps", "2", "--device", "cpu")
    metadata = board.run_metadata(tmp_path / "run")
    assert (metadata["device"], metadata["processor"]) == ("cpu", device.processor())
    assert (metadata["dtype"], metadata["compiled"], metadata["block_size"]) == ("fp32", False, 16)


# ---------------------------------------------------------------------------- comparison with nanoGPT


def test_nanogpt_iterations_with_an_evaluation_do_not_count() -> None:
    """With an evaluation every 2 steps, these are 0, 2 and 4. If all iterations have one, all count."""
    log = "\n".join(["number of parameters: 0.80M", "step 0: train loss 4.2, val loss 4.2",
                     *(f"iter {i}: loss 4.1, time {ms}ms, mfu -100.00%" for i, ms in
                       enumerate((900.0, 10.5, 300.25, 11.5, 310.0)))])
    assert vs_nanogpt.nanogpt_times(log, 2) == pytest.approx([0.0105, 0.0115])
    assert vs_nanogpt.nanogpt_times(log, 1) == pytest.approx([0.9, 0.0105, 0.30025, 0.0115, 0.31])
    figures = vs_nanogpt.figures(1.0, 2.0, [0.9, 0.8, 0.0105, 0.0115], 4, 22, None)  # the second half counts
    assert figures["tokens_per_second"] == pytest.approx(2000) and figures["training_seconds"] == pytest.approx(0.044)


def test_nanogpt_benchmark_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides use the CPU even if there is a GPU."""
    commands: list[list[str]] = []

    def no_run(command: list[str], cwd: Path) -> tuple[str, float, float]:
        commands.append(command)
        raise InterruptedError

    monkeypatch.setattr(vs_nanogpt, "timed", no_run)
    recipe = vs_nanogpt.RECIPES["cpu"]
    with pytest.raises(InterruptedError):
        vs_nanogpt.run_nanogpt(tmp_path, recipe, 4, None, compiled=False)
    with pytest.raises(InterruptedError):
        vs_nanogpt.run_bardlet(tmp_path, recipe.bardlet(4), None)
    theirs, ours = commands
    assert "--device=cpu" in theirs and ours[ours.index("--device") + 1] == "cpu"
