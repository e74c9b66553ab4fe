"""Slow tests of bad input: one line of 50 MB."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 2 --steps 2 --compile off --eval-tokens 4096"


@pytest.mark.parametrize("tokenizer", ["auto", "byte"])
@pytest.mark.parametrize("spaces", [True, False], ids=["with spaces", "without spaces"])
def test_one_line_of_50_mb(tmp_path, monkeypatch, tokenizer, spaces):
    """It trains like any text, with memory that is a small multiple of the file size."""
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    phrase = "the quick brown fox jumps over the lazy dog and runs away ".replace(" ", " " if spaces else "")
    (tmp_path / "line.txt").write_text((phrase * (50_000_000 // len(phrase) + 1))[:50_000_000], encoding="ascii")
    argv = ["train", "line.txt", "--tokenizer", tokenizer, "--out", "out", *SMALL.split()]
    done = subprocess.run(
        [sys.executable, "-m", "bardlet", *argv],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "50,000,000 characters in 1 document" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "Traceback" not in done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kB
    assert peak < 4_000_000


def test_one_bad_byte_at_the_end_of_50_mb(tmp_path, monkeypatch):
    monkeypatch.setenv("BARDLET_CACHE", str(tmp_path / "cache"))
    Path(tmp_path / "line.txt").write_bytes(b"x" * 50_000_000 + b"\xff")
    done = subprocess.run([sys.executable, "-m", "bardlet", "train", "line.txt", "--steps", "1", "--out", "out"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bardlet: line.txt: not valid UTF-8 at byte 50000000 (line 1): 0xFF")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
