"""Equivalent runs through the real command line: batches of 8 x 1 and 1 x 8, one process and two."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import settings_of
from processes import in_two_processes

from bardlet.run import hf, metrics
from bardlet.runtime import manifest

SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--log-every", "1",
         "--warmup-steps", "2", "--dtype", "fp32", "--compile", "off", "--threads", "1", "--steps", "10",
         "--keep", "last"]


def assert_same_training(run: Path, other: Path) -> None:
    """Check that the final weights and all training losses agree within 1e-5.

    Key biases are exempt: adding the same vector to all keys does not change the softmax, so their gradient is only
    rounding error, which AdamW normalizes into full steps.
    """
    a, b = hf.read_tensors(run / "model.safetensors"), hf.read_tensors(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name in (name for name in a if not name.endswith("k_proj.bias")):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    losses = [[line["train_loss"] for line in metrics.read_metrics(folder) if "train_loss" in line]
              for folder in (run, other)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model, optimizer", [("gpt2", "adamw"), ("qwen3", "adamw"), ("bigram", "adamw")])
def test_gradient_accumulation_matches_one_batch(model: str, optimizer: str, text: Path, tmp_path: Path,
                                                 bardlet: Callable[..., dict[str, Any]]) -> None:
    """--batch-size 8 and --batch-size 1 --grad-accum 8 train the same model."""
    for name, sizes in (("one", ["8", "1"]), ("two", ["1", "8"])):
        bardlet("train", text, "--out", tmp_path / name, "--model", model, "--optimizer", optimizer,
                *settings_of(model, SMALL), "--batch-size", sizes[0], "--grad-accum", sizes[1])
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_two_processes_match_one(text: Path, tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """Two processes (gloo, DistributedDataParallel) train the same model as one, and can resume."""
    settings = ["--model", "qwen3", "--optimizer", "adamw", *SMALL, "--batch-size", "4", "--grad-accum", "2",
                "--save-every", "5", "--keep-checkpoints", "9"]
    bardlet("train", text, "--out", tmp_path / "one", *settings)
    assert run_in_two(tmp_path / "log", "train", text, "--out", tmp_path / "two", *settings)["steps"] == 10
    assert_same_training(tmp_path / "one", tmp_path / "two")
    # delete everything after step 5: two processes resume there and end with the same bits
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000010"
    before = {name: manifest.sha256(checkpoint / name) for name in ("model.safetensors", "trainer.safetensors")}
    shutil.rmtree(checkpoint)
    assert run_in_two(tmp_path / "again", "resume", tmp_path / "two")["resumed_from"] == 5
    assert {name: manifest.sha256(checkpoint / name) for name in before} == before


def test_two_processes_match_one_in_translation(tmp_path: Path, bardlet: Callable[..., dict[str, Any]]) -> None:
    """The same for sentence pairs, whose batch size differs from step to step."""
    for name, word in (("a", "ein"), ("b", "one")):
        lines = (f"{word} " * (1 + n % 7) + f"{n}\n" for n in range(200))
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    settings = ["--source", tmp_path / "a", "--target", tmp_path / "b", "--optimizer", "adamw", *SMALL,
                "--batch-tokens", "96", "--label-smoothing", "0.1"]
    bardlet("train", "--out", tmp_path / "one", *settings)
    assert run_in_two(tmp_path / "log", "train", "--out", tmp_path / "two", *settings)["steps"] == 10
    assert_same_training(tmp_path / "one", tmp_path / "two")


def run_in_two(log: Path, *argv: str | Path) -> dict[str, Any]:
    """Run `bardlet ARGV --json` in two processes; return the object that rank 0, and only rank 0, prints."""
    output = in_two_processes([*argv, "--json"], log)
    assert output.count('"parameters"') == 1, "only rank 0 prints"
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("kind", ["ppo"])
def test_two_processes_match_one_in_rl(kind: str, tmp_path: Path,
                                       bardlet: Callable[..., dict[str, Any]]) -> None:  # fmt: skip
    """Each rank samples its share of a rollout; only rank 0 runs the scoring program. The final samples come from one
    process alone, although two could share their prompts."""
    (tmp_path / "text.txt").write_text("".join(f"{n} odd? {'yes' if n % 2 else 'no'}\n" for n in range(300)))
    (tmp_path / "chats.jsonl").write_text("".join(
        json.dumps({"prompt": f"{n} odd?", "answer": "yes" if n % 2 else "no"}) + "\n" for n in range(200)))
    calls = tmp_path / "calls"
    (tmp_path / "scorer.py").write_text(
        f"import json, os, sys\nopen({str(calls)!r}, 'a').write(os.environ.get('RANK', '0'))\n"
        "for line in sys.stdin: print(len(json.loads(line)['answer']))\n")
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32", "--vocab-size", "300"]
    bardlet("train", tmp_path / "text.txt", *shape, "--tokenizer", "bpe", "--steps", 5, "--dtype", "fp32", "--out",
            tmp_path / "base")  # fmt: skip
    settings = [tmp_path / "base", tmp_path / "chats.jsonl", "--reward", f"{sys.executable} {tmp_path / 'scorer.py'}",
                "--answer-tokens", "6", "--rollout", "16", "--batch-size", "8", "--steps", "6", "--dtype", "fp32",
                "--threads", "1", "--optimizer", "adamw", "--keep", "average", "--eval-every", "3"]  # fmt: skip
    bardlet(kind, *settings, "--out", tmp_path / "one")
    calls.unlink()
    assert run_in_two(tmp_path / "log", kind, *settings, "--out", tmp_path / "two")["steps"] == 6
    assert set(calls.read_text()) == {"0"}
    assert_same_training(tmp_path / "one", tmp_path / "two")
