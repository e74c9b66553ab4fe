"""The benchmark for a GPU, at toy size on a CPU: in the minutes on a GPU it must not fail for a misspelling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
