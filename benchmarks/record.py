"""A line per finished run: what was measured, on which machine, at which commit."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def commit() -> str | None:
    """The commit that was measured, `+` behind it where the tree was changed; None outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        head = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() or None


def append(name: str, figures: dict[str, Any]) -> None:
    """One line at the end of results/NAME.jsonl: date, commit, machine, then the figures."""
    import torch

    from bardlet.dist import processor

    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "torch": torch.__version__}
    line = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine, **figures}
    path = HERE / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
