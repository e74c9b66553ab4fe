"""Several processes: one that is killed is named, and nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bardlet import files

SETTINGS = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "16", "--batch-size", "4",
            "--steps", "400", "--save-every", "20", "--eval-every", "0", "--warmup-steps", "2", "--dtype", "fp32",
            "--compile", "off", "--dropout", "0.1", "--keep-checkpoints", "9"]


def launch(*words: str | Path) -> subprocess.Popen[str]:
    """`bardlet WORDS` in two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bardlet",
               *map(str, words), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def workers(launcher: int) -> dict[int, int]:
    """Process ids of the launcher's processes by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
    return found


def wait_for(path: Path, launched: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.01)


def test_one_that_is_killed_is_named_and_resume_is_exact(text: Path, tmp_path: Path) -> None:
    """Rank 1 is killed after step 20: rank 0 names it and ends; two new processes go on, and end with the same bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = launch("train", text, "--out", whole, *SETTINGS)
    launched = launch("train", text, "--out", broken, *SETTINGS)
    wait_for(broken / "checkpoints" / "step-00000020", launched)
    os.kill(workers(launched.pid)[1], signal.SIGKILL)
    _, err = launched.communicate(timeout=30)
    assert launched.returncode != 0
    assert re.search(r"bardlet: process 1 of 2 \(pid \d+ on .*\) was killed; what was saved is whole", err), err
    again = launch("resume", broken)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0, err
    assert re.search(r'"resumed_from": [1-9]', out), out
    assert done.wait(timeout=100) == 0
    for name in ("model.safetensors", "trainer.safetensors"):
        last = Path("checkpoints") / "step-00000400" / name
        assert files.sha256(whole / last) == files.sha256(broken / last)
