"""Benchmarks at toy size: in the minutes on a GPU, or beside a peer, they must not fail for a misspelling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bardlet.cli import main

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "benchmarks/gpu.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_gpu_benchmark_runs_to_its_end(tmp_path: Path) -> None:
    """All parts, with the text of a file; what it writes has the figures that LOG.md quotes."""
    text = tmp_path / "text.txt"
    text.write_text("the little bards sang their songs\n" * 100, encoding="utf-8")
    done = run("--toy", "--text", str(text), "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    for name in ("gpt2", "qwen3"):
        assert result["throughput"][name]["tokens_per_second"] > 0
    assert 0 < result["loss"]["last"] < 5
    assert result["generation"].keys() == {"fp32 batch 1", "fp32 batch 16", "bf16 batch 1", "bf16 batch 16"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """And a folder that holds no nanoGPT is one line, too."""
    done = run("--out", str(tmp_path / "gpu.json"))
    assert done.returncode != 0
    assert done.stderr.strip() == "no GPU on this machine; --toy shows on a CPU that the benchmark works"
    done = run("--toy", "--part", "throughput", "--nanogpt", str(tmp_path), "--out", str(tmp_path / "gpu.json"))
    assert done.returncode != 0
    assert done.stderr.strip().endswith("is no checkout of nanoGPT; give a folder that holds its model.py")


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


@pytest.mark.parametrize("stage", ["sft", "dpo"])
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
