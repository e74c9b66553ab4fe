"""Exact resume after interruptions: at the first step, at evaluations, at an epoch boundary, in epoch 3, repeatedly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from invariants.test_resume import Broken, break_off_after, fingerprint, without_times

from bardlet.run import folder as run_folder
from bardlet.runtime import manifest

STEPS, BATCH, CONTEXT, EVERY = 16, 4, 16, 4
BASE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", f"{CONTEXT}", "--batch-size", f"{BATCH}",
         "--steps", f"{STEPS}", "--save-every", "1", "--keep-checkpoints", "99", "--eval-every", f"{EVERY}",
         "--warmup-steps", "2", "--log-every", "2", "--threads", "1"]
KINDS = {"accumulation": {"--grad-accum": "2"}, "dropout": {"--dropout": "0.2"}, "bf16": {"--dtype": "bf16"},
        "compile": {"--compile": "on"}, "average": {"--keep": "average"}, "muon": {"--optimizer": "muon"}}
PLACES = ("step 1", "before an evaluation", "after an evaluation", "epoch edge", "third epoch", "resume of a resume")

Command = Callable[..., dict[str, Any]]


def settings(kind: str) -> list[str]:
    """Return settings that differ from the simplest run in one option."""
    values = {"--dtype": "fp32", "--compile": "off", "--optimizer": "adamw", "--keep": "last", **KINDS[kind]}
    return [*BASE, *(word for pair in values.items() for word in pair)]


def steps_of(place: str, kind: str, tokens: int) -> list[int]:
    """Return the steps whose checkpoints are the last ones before an interruption."""
    windows, rows = (tokens - CONTEXT) // CONTEXT, BATCH * (2 if kind == "accumulation" else 1)
    edge = windows // rows  # the batch after this many steps spans two epochs
    third = -(-2 * windows // rows)
    assert windows % rows and third + 1 < STEPS
    return {"step 1": [1], "before an evaluation": [EVERY - 1], "after an evaluation": [EVERY], "epoch edge": [edge],
            "third epoch": [third + 1], "resume of a resume": [2, 6, 14]}[place]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text so short that a few steps are an epoch."""
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text("".join(f"{n} little bards, {n * n % 97} songs\n" for n in range(16)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the uninterrupted run of a kind."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def run(kind: str) -> Path:
        from bardlet.cli import main

        assert main(["train", str(short), "--out", str(folder / kind), *settings(kind)]) == 0
        return folder / kind

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_resume_is_exact(place: str, kind: str, short: Path, whole: Callable[[str], Path], tmp_path: Path,
                         bardlet: Command) -> None:
    """The bits are the same, and no step before the checkpoint is repeated."""
    expected, run = whole(kind), tmp_path / "run"
    for number, step in enumerate(steps_of(place, kind, run_folder.read_run(expected)[1]["tokens"])):
        command = ["resume", run] if number else ["train", short, "--out", run, *settings(kind)]
        with pytest.MonkeyPatch.context() as patch:
            break_off_after(step + 1, patch)
            with pytest.raises(Broken):
                bardlet(*command)
    assert bardlet("resume", run)["resumed_from"] == step
    assert fingerprint(run, STEPS) == fingerprint(expected, STEPS)
    assert without_times(run) == without_times(expected)
    assert manifest.sha256(run / "model.safetensors") == manifest.sha256(expected / "model.safetensors")
    assert run_folder.read_run(run)[1]["machine"]["compiled"] == (kind == "compile")
