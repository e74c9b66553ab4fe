"""The losses of the fine-tuning stages against TRL's own, on the same tensors.

TRL is no dependency of the tests: BARDLET_TRL_PYTHON names the Python of an environment with `pip install trl`.
`tests/training/test_alignment_losses.py` compares the same losses with their formulas.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bardlet.cli import main

PEER = os.environ.get("BARDLET_TRL_PYTHON") or (sys.executable if importlib.util.find_spec("trl") else None)
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "vs_trl.py"
LOSSES = ("SFT", "SFT, packed", "DPO", "reward model", "KTO", "GRPO", "clipped policy", "KL estimate")


@pytest.mark.skipif(PEER is None, reason="needs TRL: set BARDLET_TRL_PYTHON to the Python of an environment with it")
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_losses_and_gradients_are_those_of_trl(family: str, tmp_path: Path) -> None:
    """To a relative difference of 1e-5, which the benchmark checks; it exits with 1 otherwise."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"say {n} {word}.\n" for n in range(200) for word in ("yes", "no")), encoding="utf-8")
    assert main(["train", str(text), "--model", family, "--tokenizer", "bpe", "--vocab-size", "280", "--n-layer", "2",
                 "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--batch-size", "8", "--steps", "20",
                 "--compile", "off", "--out", str(tmp_path / "base")]) == 0  # fmt: skip
    done = subprocess.run([sys.executable, str(BENCHMARK), "parity", str(tmp_path / "base"), "--peer-python", str(PEER),
                           "--threads", "1"], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line[:16].strip() for line in done.stdout.splitlines()]
    assert [name for name in names if name in LOSSES] == list(LOSSES)
