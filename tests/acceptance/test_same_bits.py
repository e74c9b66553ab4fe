"""tools/same_bits.py: it sees one reordered operation, and what the version before has written can still be read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEFORE = "ab50cc5"
"""The last commit of the first edition, which made the runs, checkpoints and caches that people have."""


def same_bits(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The script, called from the repository's root."""
    command = [sys.executable, str(ROOT / "tools" / "same_bits.py"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_one_reordered_operation_is_seen(tmp_path: Path) -> None:
    """A block of GPT-2 that adds x + (a + m) in place of (x + a) + m differs, and Qwen3 does not."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    path = next(path for path in (tmp_path / "src").rglob("gpt2.py") if "wpe" in path.read_text(encoding="utf-8"))
    code = path.read_text(encoding="utf-8")
    before = ("        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), mask, store)\n"
              "        return x_BTC + self.mlp(self.ln_2(x_BTC))\n")
    after = ("        a_BTC = self.attn(self.ln_1(x_BTC), mask, store)\n"
             "        return x_BTC + (a_BTC + self.mlp(self.ln_2(x_BTC + a_BTC)))\n")
    assert code.count(before) == 1
    path.write_text(code.replace(before, after), encoding="utf-8")
    done = same_bits(ROOT, tmp_path, "--cells", "gpt2", "qwen3")
    assert done.returncode == 1 and "equal: 1 of 2" in done.stdout, done.stdout + done.stderr
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["qwen3"] == "equal" and "model.safetensors transformer.h.0" in said["gpt2"], done.stdout


def test_the_version_before_can_still_be_read() -> None:
    """Resumed, sampled and evaluated by this version, its 24 runs do what they do with their own."""
    look_up = ["git", "cat-file", "-e", f"{BEFORE}^{{commit}}"]
    if subprocess.run(look_up, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"commit {BEFORE} is not in this checkout")
    done = same_bits(BEFORE, ROOT, "--handover")
    assert done.returncode == 0, done.stdout + done.stderr
