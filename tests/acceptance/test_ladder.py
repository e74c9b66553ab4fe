"""The lecture's rungs on the lecture's text: each ends where the lecture says, and the ladder climbs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bardlet.ladder.rungs import LADDER, bands

if not os.environ.get("BARDLET_DATA"):
    pytest.skip("needs BARDLET_DATA, with Tiny Shakespeare in it", allow_module_level=True)


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
