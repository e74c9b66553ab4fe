"""The notebooks at full size: about eight minutes on one core. The lecture needs Tiny Shakespeare for its bands."""

from __future__ import annotations

import re
from pathlib import Path

import notebook_runs
import pytest

from bardlet.data import corpus
from bardlet.errors import BardletError

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def has_shakespeare() -> bool:
    """Return True if Tiny Shakespeare is here or can be fetched."""
    try:
        corpus.find(["tinyshakespeare"])
    except BardletError:
        return False
    return True


def test_the_lecture_has_normal_losses(tmp_path: Path) -> None:
    """A band covers 19 of 20 seeds, so one of the seven may be outside; with a mistake, several would be."""
    if not has_shakespeare():
        pytest.skip("Tiny Shakespeare is missing: set BARDLET_DATA")
    printed = notebook_runs.printed(notebook_runs.run(NOTEBOOKS / "lecture.ipynb", tmp_path))
    where = re.findall(r"your loss is (inside|ABOVE|BELOW) this band", printed)
    assert len(where) == 7 and where.count("inside") >= 6, printed


def test_the_lecture_runs_on_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Tiny Shakespeare it falls back to the embedded text, and shows no band."""
    monkeypatch.setenv("BARDLET_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a download fails at once
    cells = notebook_runs.run(NOTEBOOKS / "lecture.ipynb", tmp_path, "SHARE = 0.01")
    printed = notebook_runs.printed(cells)
    assert "python-docs: " in printed and printed.count("no normal band") == 7


def test_a_model_of_tiny_shakespeare_beats_the_bigram(tmp_path: Path) -> None:
    """Two minutes of training; the bigram has 2.49 nats per character on Tiny Shakespeare."""
    if not has_shakespeare():
        pytest.skip("Tiny Shakespeare is missing: set BARDLET_DATA")
    printed = notebook_runs.printed(notebook_runs.run(NOTEBOOKS / "own-text.ipynb", tmp_path))
    loss = re.search(r"validation split of .*: (\d\.\d{3}) nats per character", printed)
    assert loss and float(loss[1]) < 2.2, printed


def test_a_model_of_your_own_text_trains_and_shows_itself(tmp_path: Path) -> None:
    """Progress, curve and table are inline: the bar with its curve, the run, the plot and the guesses."""
    (tmp_path / "my.txt").write_text("To be, or not to be, that is the question\n" * 100, encoding="utf-8")
    cells = notebook_runs.run(NOTEBOOKS / "own-text.ipynb", tmp_path, notebook_runs.OWN_TEXT)
    html = notebook_runs.shown(cells, "text/html")
    assert any('<progress value="10" max="10"' in text and "<polyline" in text for text in html)
    assert any("runs/my-qwen3" in text and "data:image/png;base64," in text for text in html)
    assert len(notebook_runs.shown(cells, "image/png")) == 1
    guesses, runs = notebook_runs.shown(cells, "text/markdown")
    assert guesses.count("\n") == 1 + len("To be") - 1 + 12 - 1 and "%" in guesses
    assert "| runs/my-qwen3 | train | finished |" in runs
    assert re.search(r"validation split of my: \d\.\d{3} nats per character", notebook_runs.printed(cells))


def test_the_chat_model_learns_to_choose_the_right_answer(tmp_path: Path) -> None:
    """GRPO and DPO both answer more sums than the fine-tuned model: 80 and 53 against 36 of 100, with one seed."""
    [table] = notebook_runs.shown(notebook_runs.run(NOTEBOOKS / "chat.ipynb", tmp_path), "text/markdown")
    sft, dpo, grpo = map(int, re.findall(r"(\d+)%", table.splitlines()[-1]))
    assert dpo > sft and grpo > sft + 15, table
