"""Benchmarks at toy size, uncompiled, beside stand-ins of their peers: that they come to an end, and how they count."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bardlet.cli import main

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

GPT = """
from dataclasses import dataclass
from torch import nn, optim
rows = []

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, idx, targets):
        rows.append(len(idx))
        logits = self.head(self.table(idx))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
"""Stands in for nanoGPT's model.py: what gpu.py calls, and a table for a model."""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """gpu.sh, called in `folder`, where nanogpt/ is the stand-in and text.txt a text."""
    (folder / "nanogpt").mkdir()
    (folder / "nanogpt" / "model.py").write_text(GPT)
    (folder / "text.txt").write_text("the little bards sang their songs\n" * 100, encoding="utf-8")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_gpu_benchmark_runs_to_its_end(tmp_path: Path) -> None:
    """All parts, with paths as they are seen from where it is called: a figure of each, and a model that has learned.

    The shares count 6 flops a token and parameter, position embeddings aside, and 12 for attention.
    """
    results = ROOT / "benchmarks" / "results" / "gpu.jsonl"
    before = results.exists() and results.read_bytes()
    done = run(tmp_path, "--toy", "--text", "text.txt", "--nanogpt", "nanogpt", "--out", "new/gpu.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "new" / "gpu.json").read_text(encoding="utf-8"))
    for name, positions in (("gpt2", 32 * 32), ("qwen3", 0), ("nanoGPT", 32 * 32)):
        side = result["throughput"][name]
        flops = 6 * (side["parameters"] - positions) + 12 * 2 * 32 * 32
        share = side["tokens_per_second"] * flops / result["throughput"]["bf16_product_flops"]
        assert side["share_of_measured_rate"] == pytest.approx(share) and side["mfu"] is None
        assert (side["tokens_per_step"], side["grad_accum"]) == (64, 1)
    steps, _, losses = zip(*result["loss"]["curve"], strict=True)
    assert steps == tuple(range(1, 41)) and losses[-1] == result["loss"]["last"]
    assert losses[-1] < 2.5 < losses[0], "17 characters, each as likely, are ln 17 = 2.83 nats"
    assert result["generation"].keys() == {"fp32 batch 1", "fp32 batch 16", "bf16 batch 1", "bf16 batch 16"}
    assert before == (results.exists() and results.read_bytes()), "a toy is no result"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--out", "gpu.json")
    assert done.returncode != 0
    assert done.stderr.strip() == "no GPU on this machine; --toy shows on a CPU that the benchmark works"


@pytest.mark.parametrize(("words", "said"), [
    (["--part", "throughput", "--nanogpt", "."], r"is no checkout of nanoGPT; give a folder that holds its model\.py$"),
    (["--text", "gone.txt"], "^gone.txt: there is no Tiny Shakespeare; name its file with --text$"),
])  # fmt: skip
def test_what_is_missing_is_said_before_anything_is_measured(words: list[str], said: str, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", *words])
    with pytest.raises(SystemExit, match=said):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_what_fails_takes_nothing_else_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that cannot be loaded: its error stands where its figures would, and the exit code tells of it."""
    (tmp_path / "model.py").write_text("raise ValueError('not\\ntoday')\n")
    words = ["--toy", "--part", "throughput", "--part", "generation", "--nanogpt", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match=r"^failed: nanoGPT$"):
        gpu.main()
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert result["throughput"]["nanoGPT"] == {"error": "ValueError: not today"}
    assert result["throughput"]["qwen3"]["tokens_per_second"] > 0 and len(result["generation"]) == 4


def test_a_whole_run_is_a_line_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device and without the curve; where the compiler lacks something, that is said, and all is eager."""
    lines: list[tuple[str, dict[str, Any]]] = []
    out = tmp_path / "gpu.json"
    asked = argparse.Namespace(device=CPU, toy=False, part=gpu.PARTS, out=out, nanogpt=None, text=None)
    monkeypatch.setattr(gpu, "arguments", lambda: asked)
    monkeypatch.setattr(gpu.compiler, "compiler_missing", lambda device: "no C compiler (gcc) on this machine")
    monkeypatch.setattr(gpu, "throughput", lambda device, toy, compiled, nanogpt: {"qwen3": {"compiled": compiled}})
    monkeypatch.setattr(gpu, "to_loss", lambda *_: {"last": 1.4, "curve": [[1, 0.1, 1.4]]})
    monkeypatch.setattr(gpu, "generation", lambda *_: {"fp32 batch 1": 700.0})
    monkeypatch.setattr(gpu.record, "append", lambda *line: lines.append(line))
    gpu.main()
    [(name, line)] = lines
    assert name == "gpu" and line["device"] == gpu.runtime_device.processor()
    assert line["throughput"] == {"qwen3": {"compiled": False}} and line["loss"] == {"last": 1.4}
    assert line["compiler_missing"] == "no C compiler (gcc) on this machine"
    assert json.loads(out.read_text(encoding="utf-8"))["loss"]["curve"] == [[1, 0.1, 1.4]]


def test_a_batch_that_does_not_fit_into_memory_is_cut() -> None:
    """In halves, quarters and so on, down to single rows; another error is none of memory."""
    tried: list[int] = []

    def measure(number: int) -> dict[str, Any]:
        tried.append(number)
        if number < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"found": 1}

    assert gpu.fitting(measure, 8, CPU) == {"grad_accum": 4, "found": 1} and tried == [1, 2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        gpu.fitting(measure, 2, CPU)
    tried.clear()
    with pytest.raises(KeyError):
        gpu.fitting(lambda number: {}[tried.append(number)], 8, CPU)
    assert tried == [1]


def test_micro_batches_are_the_same_step(tmp_path: Path) -> None:
    """Of bardlet the same loss and gradient; the peer is given half of the rows twice."""
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}
    idx = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"idx": idx[:, :-1].contiguous(), "target": idx[:, 1:].contiguous()}
    whole, halves = (gpu.our_step("gpt2", size, 11, batch, CPU, False, number)[0]() for number in (1, 2))
    assert halves == pytest.approx(whole, rel=0.01)  # bf16
    (tmp_path / "model.py").write_text(GPT)
    for number, rows in ((1, [4]), (2, [2, 2])):
        step, _ = gpu.nanogpt_step(tmp_path, size, 11, batch, CPU, False, number)
        step()
        assert sys.modules["nanogpt_model"].rows == rows


def test_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 tokens in 0.25 s are 200 a second, and with 6 Mflop a token 1.2 Gflop/s: half of 2.4, a quarter of 4.8."""
    monkeypatch.setattr(gpu, "peak", lambda device: 4.8e9)
    figures = gpu.speed([0.2, 0.25, 9.0], 50, 6e6, 2.4e9, CPU)
    found = [figures[name] for name in ("tokens_per_second", "share_of_measured_rate", "mfu", "step_ms")]
    assert found == pytest.approx([200, 0.5, 0.25, 250])


@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 D", 147e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA T4", None),
])  # fmt: skip
def test_the_peak_of_a_card_is_its_own(name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of another whose name it begins with."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu.peak(torch.device("cuda")) == flops


PEER = """
import json, sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import vs_trl
_, _, question, answer = sys.argv
job = json.loads(Path(question).read_text())
assert job["settings"]["per_device_train_batch_size"] * job["settings"]["gradient_accumulation_steps"] == job["rows"]
made = vs_trl.ours({{**job, "settings": {{"optimizer": "adamw", "compile": "off"}}}})
Path(answer).write_text(json.dumps({{**made, {changed}}}))
"""
"""Stands in for TRL: it does the job by bardlet's side, and answers as trl_peer.py does."""


def vs_trl(folder: Path, changed: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The benchmark beside TRL, one repeat, with the stand-in; changed: what it says instead."""
    (folder / "peer.py").write_text(PEER.format(benchmarks=str(ROOT / "benchmarks"), changed=changed))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "peer.py"} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, str(ROOT / "benchmarks" / "vs_trl.py"), *map(str, words), "--peer-python", str(python),
               "--repeats", "1", "--threads", "1", "--rows", "4", "--block-size", "48"]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("the little bards sang their songs\n" * 200)
    assert main(["train", str(folder / "text.txt"), "--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--tokenizer",
                 "bpe", "--vocab-size", "300", "--block-size", "48", "--steps", "2", "--compile", "off", "--out",
                 str(folder / "run")]) == 0  # fmt: skip
    return folder / "run"


@pytest.mark.parametrize("stage", ["sft"])
def test_the_benchmark_beside_trl_counts_the_same_on_both_sides(stage: str, base: Path, tmp_path: Path) -> None:
    """Every token but the first of each conversation, in a pass over records that fit; the rest is left out."""
    records: list[dict[str, str]] = []
    for n in range(40):
        words = [f"sing {n}", "the little bards " * (1 + n % 3), "songs"] if n % 8 else [f"sing {n}", "la " * 60, "no"]
        names = ("instruction", "output") if stage == "sft" else ("prompt", "chosen", "rejected")
        records.append(dict(zip(names, words, strict=False)))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    sides = ["bardlet, eager", "TRL packed, 1 at a time" if stage == "sft" else "TRL, 4 at a time"]
    done = vs_trl(tmp_path, "", stage, base, tmp_path / "data.jsonl", "--records", "20", "--only", *sides)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [next(iter(json.loads(line).items())) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [name for name, _ in found] == sides
    conversations = [round(figures["conversations"] * figures["seconds"]) for _, figures in found]
    assert conversations == [20 if stage == "sft" else 40] * 2
    own, their = (figures["tokens"] / figures["conversations"] for _, figures in found)  # both are rates, and rounded
    assert own == pytest.approx(their, rel=0.01)
    assert f"{sides[1]:34}" in done.stdout and "floor: " in done.stdout


def test_a_peer_that_learns_from_other_tokens_is_not_compared(base: Path, tmp_path: Path) -> None:
    records = [{"instruction": f"sing {n}", "output": "the little bards"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    done = vs_trl(tmp_path, '"learned": "other"', "sft", base, tmp_path / "data.jsonl", "--only", "TRL padded")
    assert done.returncode != 0 and "does not learn from the same tokens" in done.stderr
