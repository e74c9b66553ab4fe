"""tools/same_bits.py detects one reordered operation, and shows that files of the first edition can still be read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST_EDITION = "ab50cc5"
"""The last commit of the first edition, which wrote the runs, checkpoints and caches that users have."""


def same_bits(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script from the repository's root."""
    command = [sys.executable, str(ROOT / "tools" / "same_bits.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_one_reordered_operation_is_detected(tmp_path: Path) -> None:
    """A GPT-2 block that computes x + (a + m) instead of (x + a) + m differs; Qwen3 does not."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    path = tmp_path / "src" / "bardlet" / "models" / "gpt2.py"
    code = path.read_text(encoding="utf-8")
    before = ("        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), mask, cache)\n"
              "        return x_BTC + self.mlp(self.ln_2(x_BTC))\n")
    after = ("        a_BTC = self.attn(self.ln_1(x_BTC), mask, cache)\n"
             "        return x_BTC + (a_BTC + self.mlp(self.ln_2(x_BTC + a_BTC)))\n")
    assert code.count(before) == 1
    path.write_text(code.replace(before, after), encoding="utf-8")
    done = same_bits(ROOT, tmp_path, "--cells", "gpt2", "qwen3")
    assert done.returncode == 1 and "equal: 1 of 2" in done.stdout, done.stdout + done.stderr
    cells = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert cells["qwen3"] == "equal" and "model.safetensors transformer.h.0" in cells["gpt2"], done.stdout


def test_first_edition_can_still_be_read() -> None:
    """This version resumes, samples from and evaluates its 24 runs with the same results."""
    lookup = ["git", "cat-file", "-e", f"{FIRST_EDITION}^{{commit}}"]
    if subprocess.run(lookup, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"commit {FIRST_EDITION} is not in this checkout")
    done = same_bits(FIRST_EDITION, ROOT, "--handover")
    assert done.returncode == 0, done.stdout + done.stderr
