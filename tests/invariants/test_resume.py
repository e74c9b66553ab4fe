"""Exact resume: an interrupted and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settings_of

from bardlet import console
from bardlet.run import checkpoint, metrics
from bardlet.run import folder as run_folder
from bardlet.runtime import manifest
from bardlet.runtime.compiler import compiler_missing
from bardlet.training import trainer

SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4", "--log-every",
         "2", "--warmup-steps", "2", "--threads", "1", "--steps", "10", "--save-every", "5", "--keep-checkpoints", "9"]

MODES = {"eager fp32": ["--dtype", "fp32", "--compile", "off"], "compiled bf16": ["--dtype", "bf16", "--compile", "on"]}

EXTRAS = {
    "dropout": ["--dropout", "0.2", "--eval-every", "3"],
    "accumulation": ["--grad-accum", "2", "--eval-every", "4"],
    "average": ["--keep", "average", "--eval-every", "5"],
    "evaluation off": ["--eval-every", "0"],
}

# every pair of (model, extra), (optimizer, mode) and (optimizer, extra); only three cells compile blocks, because one
# compilation takes as long as all other cells; tests/acceptance/test_resume.py has all 48 cells
PAIRWISE = [
    ("gpt2", "adamw", "eager fp32", "dropout"), ("gpt2", "adamw", "compiled bf16", "accumulation"),
    ("gpt2", "adamw", "eager fp32", "average"), ("gpt2", "muon", "eager fp32", "evaluation off"),
    ("qwen3", "adamw", "compiled bf16", "dropout"), ("qwen3", "muon", "eager fp32", "accumulation"),
    ("qwen3", "muon", "eager fp32", "average"), ("qwen3", "adamw", "eager fp32", "evaluation off"),
    ("bigram", "muon", "eager fp32", "dropout"), ("bigram", "adamw", "compiled bf16", "accumulation"),
    ("bigram", "muon", "eager fp32", "average"), ("bigram", "adamw", "compiled bf16", "evaluation off"),
    ("layer-norm", "adamw", "eager fp32", "accumulation"), ("qk-norm", "muon", "compiled bf16", "average"),
]


class Broken(BaseException):
    """A power cut."""


def settings(model: str, optimizer: str, mode: str, extra: str) -> list[str]:
    """Return the command line of a cell, without the settings that the model does not have."""
    argv = ["--optimizer", optimizer, *SMALL, *MODES[mode], *EXTRAS[extra]]
    return ["--model", model, *settings_of(model, argv)]


def break_off_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make the next run raise Broken right after `step` steps."""
    original = console._lines

    def lines(unit: str, budget: float | None = None) -> console.Watch:
        watch = original(unit, budget)

        def see(line: dict[str, Any]) -> None:
            watch(line)
            if line["step"] == step:
                raise Broken

        return see

    patch.setattr(console, "_lines", lines)


def without_times(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and speeds."""
    lines = metrics.read_metrics(run)
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def fingerprint(run: Path, step: int) -> dict[str, str]:
    """Return sha256 hashes of a checkpoint: weights; optimizer, weight average and random state."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {name: manifest.sha256(folder / name) for name in ("model.safetensors", "trainer.safetensors")}


@pytest.mark.parametrize("cell", PAIRWISE, ids=" ".join)
def test_ten_steps_equal_five_and_five(cell: tuple[str, ...], text: Path, tmp_path: Path,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:
    """A run that dies after step 7 resumes from its checkpoint of step 5 and ends with the same bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    bardlet("train", text, "--out", whole, *settings(*cell))
    with pytest.MonkeyPatch.context() as patch:
        break_off_after(7, patch)
        with pytest.raises(Broken):
            bardlet("train", text, "--out", broken, *settings(*cell))
    assert [folder.name for folder in checkpoint.steps_saved(broken)] == ["step-00000005"]
    compiled = run_folder.read_run(whole)[1]["machine"]["compiled"]
    can_compile = compiler_missing(torch.device("cpu")) is None and cell[0] != "bigram"  # a bigram has no blocks
    assert compiled == (cell[2] == "compiled bf16" and can_compile)

    with pytest.MonkeyPatch.context() as patch:
        steps: list[int] = []
        original = trainer.seed_step
        patch.setattr(trainer, "seed_step", lambda seed, step, rank: (steps.append(step), original(seed, step, rank)))
        summary = bardlet("resume", broken)
    assert summary["resumed_from"] == 5
    assert steps == [5, 6, 7, 8, 9], "steps before the checkpoint were computed again"
    assert fingerprint(broken, 10) == fingerprint(whole, 10)
    assert without_times(broken) == without_times(whole)
    assert manifest.sha256(broken / "model.safetensors") == manifest.sha256(whole / "model.safetensors")


@pytest.mark.parametrize("model", ["gpt2", "qwen3", "bigram"])
def test_evaluation_has_no_side_effects(model: str, text: Path, tmp_path: Path,
                                        bardlet: Callable[..., dict[str, Any]]) -> None:
    """The checkpoints are the same with an evaluation after every second step and without any."""
    for name, every in (("often", "2"), ("never", "0")):
        bardlet("train", text, "--out", tmp_path / name, "--model", model,
                *settings_of(model, [*SMALL, *MODES["eager fp32"], "--dropout", "0.1"]), "--eval-every", every)
    for step in (5, 10):
        assert fingerprint(tmp_path / "often", step) == fingerprint(tmp_path / "never", step)


def test_a_resumed_run_can_be_resumed(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """Two interruptions give the same bits, too."""
    cell = ("qwen3", "muon", "eager fp32", "dropout")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    bardlet("train", text, "--out", whole, *settings(*cell), "--save-every", "2")
    for command in (["train", text, "--out", broken, *settings(*cell), "--save-every", "2"], ["resume", broken]):
        with pytest.MonkeyPatch.context() as patch:
            break_off_after(5 if command[0] == "train" else 7, patch)
            with pytest.raises(Broken):
                bardlet(*command)
    assert bardlet("resume", broken)["resumed_from"] == 6
    assert fingerprint(broken, 10) == fingerprint(whole, 10)
    assert without_times(broken) == without_times(whole)
