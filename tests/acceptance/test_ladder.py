"""All rungs make their report; those of the lecture end where the lecture says on its text, and the ladder climbs."""

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
    """Thirteen rungs of a few steps, each with its pictures, code and sample."""
    monkeypatch.setattr(run, "SMALL", {**run.SMALL, "steps": 12})
    monkeypatch.setattr(run, "CPU", {**run.CPU, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
                                     "batch_size": 4})
    monkeypatch.setitem(LADDER[0].settings, "steps", 9)
    said = bardlet("ladder", text, "--minutes", "0.002", "--out", tmp_path / "l")
    assert [line["rung"] for line in said["rungs"]] == list(range(1, 14))
    page = Path(said["report"]).read_text(encoding="utf-8")
    assert all(rung.title in page for rung in LADDER)


@pytest.mark.skipif(not os.environ.get("BARDLET_DATA"), reason="needs BARDLET_DATA, with Tiny Shakespeare in it")
def test_the_lecture_s_rungs(bardlet: Callable[..., dict[str, Any]], tmp_path: Path,
                             record_property: Callable[[str, object], None]) -> None:
    """Every loss is within 0.03 of the lecture and normal for one seed; from rung 3 on each is lower than the last."""
    began = time.monotonic()
    said = bardlet("ladder", "--rungs", "1-7", "--out", tmp_path / "l")
    record_property("seconds", round(time.monotonic() - began))
    losses = {line["name"]: line["val_loss"] for line in said["rungs"]}
    for rung, line in zip(LADDER, said["rungs"], strict=False):
        band = bands()[rung.name]
        assert band["low"] <= line["val_loss"] <= band["high"], rung.name
        assert line["lecture"] == rung.lecture
        if rung.lecture is not None:
            assert abs(line["val_loss_lecture_way"] - rung.lecture) <= 0.03, rung.name
    climbing = [losses[rung.name] for rung in LADDER[2:6]]
    assert climbing == sorted(climbing, reverse=True)
    assert losses["layer-norm"] < losses["residual"] + bands()["layer-norm"]["deviation"]
