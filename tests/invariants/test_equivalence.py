"""Runs that must be the same run: 8 x 1 and 1 x 8, one process and two, through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settings_of

from bardlet import checkpoint, files, hf

SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--log-every", "1",
         "--warmup-steps", "2", "--dtype", "fp32", "--compile", "off", "--threads", "1", "--steps", "10",
         "--keep", "last"]


def same(one: Path, two: Path) -> None:
    """The weights and the losses on the way agree within 1e-5.

    But for the biases of keys: what is added to all keys of a softmax alike changes nothing, so that their gradient is
    rounding and nothing else, which AdamW, dividing it by its own size, makes steps of.
    """
    a, b = hf.read_tensors(one / "model.safetensors"), hf.read_tensors(two / "model.safetensors")
    assert a.keys() == b.keys()
    for name in (name for name in a if not name.endswith("k_proj.bias")):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    losses = [[line["train_loss"] for line in checkpoint.read_metrics(run) if "train_loss" in line]
              for run in (one, two)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model, optimizer", [("gpt2", "adamw"), ("qwen3", "adamw"), ("bigram", "adamw")])
def test_eight_by_one_is_one_by_eight(model: str, optimizer: str, text: Path, tmp_path: Path,
                                      bardlet: Callable[..., dict[str, Any]]) -> None:
    """--batch-size 8 and --batch-size 1 --grad-accum 8 are the same run."""
    for name, sizes in (("one", ["8", "1"]), ("two", ["1", "8"])):
        bardlet("train", text, "--out", tmp_path / name, "--model", model, "--optimizer", optimizer,
                *settings_of(model, SMALL), "--batch-size", sizes[0], "--grad-accum", sizes[1])
    same(tmp_path / "one", tmp_path / "two")


def test_two_processes_are_one(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """torchrun with two processes (gloo, DistributedDataParallel) does what one does, and can be resumed."""
    settings = ["--model", "qwen3", "--optimizer", "adamw", *SMALL, "--batch-size", "4", "--grad-accum", "2",
                "--save-every", "5", "--keep-checkpoints", "9"]
    bardlet("train", text, "--out", tmp_path / "one", *settings)
    assert torchrun("train", text, "--out", tmp_path / "two", *settings)["steps"] == 10
    same(tmp_path / "one", tmp_path / "two")
    # what was done after step 5 is taken away: two processes go on from there, and end with the same bits
    weights = tmp_path / "two" / "checkpoints" / "step-00000010"
    before = {name: files.sha256(weights / name) for name in ("model.safetensors", "trainer.safetensors")}
    shutil.rmtree(weights)
    assert torchrun("resume", tmp_path / "two")["resumed_from"] == 5
    assert {name: files.sha256(weights / name) for name in before} == before


def test_two_processes_translate_as_one(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """The same for pairs of sentences, whose batches have other sizes at each step."""
    for name, word in (("a", "ein"), ("b", "one")):
        lines = (f"{word} " * (1 + n % 7) + f"{n}\n" for n in range(200))
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    settings = ["--source", tmp_path / "a", "--target", tmp_path / "b", "--optimizer", "adamw", *SMALL,
                "--batch-tokens", "96", "--label-smoothing", "0.1"]
    bardlet("train", "--out", tmp_path / "one", *settings)
    assert torchrun("train", "--out", tmp_path / "two", *settings)["steps"] == 10
    same(tmp_path / "one", tmp_path / "two")


def torchrun(*argv: str | Path) -> dict[str, Any]:
    """`bardlet ARGV --json` in two processes; the object that rank 0 prints, and nobody else."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bardlet"]
    done = subprocess.run([*command, *map(str, argv), "--json"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('"parameters"') == 1, "only rank 0 prints"
    return json.loads(done.stdout.splitlines()[-1])
