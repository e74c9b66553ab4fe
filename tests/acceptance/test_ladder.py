"""The report of all rungs, and the losses of the lecture's rungs on its own text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bardlet.ladder import run
from bardlet.ladder.rungs import LADDER, bands


def test_all_rungs_in_one_report(bardlet: Callable[..., dict[str, Any]], text: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen rungs with a few steps each, all on the page."""
    monkeypatch.setattr(run, "SMALL", {**run.SMALL, "steps": 12})
    monkeypatch.setattr(run, "CPU", {**run.CPU, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
                                     "batch_size": 4})
    monkeypatch.setitem(LADDER[0].settings, "steps", 9)
    result = bardlet("ladder", text, "--minutes", "0.002", "--out", tmp_path / "l")
    assert [row["rung"] for row in result["rungs"]] == list(range(1, 14))
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert all(rung.title in page for rung in LADDER)


@pytest.mark.skipif(not os.environ.get("BARDLET_DATA"), reason="needs BARDLET_DATA with Tiny Shakespeare")
def test_lecture_rungs_reach_the_lecture_losses(bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                                                record_property: Callable[[str, object], None]) -> None:
    """Each loss is within 0.03 of the lecture and inside its band; from rung 3 on, each is lower than the last."""
    started = time.monotonic()
    result = bardlet("ladder", "--rungs", "1-7", "--out", tmp_path / "l")
    record_property("seconds", round(time.monotonic() - started))
    losses = {row["name"]: row["val_loss"] for row in result["rungs"]}
    for rung, row in zip(LADDER, result["rungs"], strict=False):
        band = bands()[rung.name]
        assert band["low"] <= row["val_loss"] <= band["high"], rung.name
        assert row["lecture"] == rung.lecture
        if rung.lecture is not None:
            assert abs(row["val_loss_lecture_way"] - rung.lecture) <= 0.03, rung.name
    falling = [losses[rung.name] for rung in LADDER[2:6]]
    assert falling == sorted(falling, reverse=True)
    assert losses["layer-norm"] < losses["residual"] + bands()["layer-norm"]["deviation"]
