"""The parity tests with the newest transformers 4 instead of version 5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]

# transformers 4 and the versions that it needs; torch and the rest come from this environment
PACKAGES = ["transformers>=4.57,<5", "tokenizers<0.23", "huggingface_hub<1", "requests", "urllib3", "certifi",
            "charset-normalizer", "idna"]


def test_parity_with_transformers_4(tmp_path: Path) -> None:
    """tests/run/test_hf.py, tests/models/test_gpt2.py and test_llama.py pass."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *PACKAGES],
                   check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    version = subprocess.run([sys.executable, "-c", "import transformers; print(transformers.__version__)"],
                             env=environment, capture_output=True, text=True, check=True).stdout
    assert version.startswith("4."), version
    files = [str(HERE / name) for name in ("run/test_hf.py", "models/test_gpt2.py", "models/test_llama.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", *files], env=environment, capture_output=True, text=True)
    print(version, done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
