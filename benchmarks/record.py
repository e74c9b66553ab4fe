"""A line per finished run: what was measured, on which machine, at which commit.

Most benchmarks write their line when they end. What a ladder holds was measured earlier: its lines have the date,
versions and machine that its runs noted themselves, and the recording's own date and commit under names that say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@cache
def commit() -> str | None:
    """The commit that was measured, `+` behind it where a tracked file is not as it was there; None outside a checkout.

    What benchmarks write themselves, their results and the board, does not count. Asked once for all lines of a run.
    """
    looked_at = (":/", ":(exclude)results", ":(exclude)README.md")  # all of the checkout but these
    try:
        head = git("describe", "--always", "--abbrev=12")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *looked_at)
    except OSError:
        return None
    return head + "+" * bool(changed) if head else None


def git(*words: str) -> str:
    """What git says of this checkout; nothing where it fails."""
    return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()


def append(name: str, figures: dict[str, Any]) -> None:
    """One line at the end of results/NAME.jsonl, of what was measured just now: date, commit, machine, the figures."""
    import torch

    from bardlet.runtime.device import pick_dtype, processor

    # two types of processor may have one name: what the faster multiplies natively in sets them apart
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "native": pick_dtype("auto", torch.device("cpu")), "torch": torch.__version__}
    write(name, {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine, **figures})


def append_earlier(name: str, figures: dict[str, Any]) -> None:
    """The same for what was measured earlier: `figures` say themselves when and by what."""
    write(name, {"recorded": time.strftime("%Y-%m-%d"), "recorded_commit": commit(), **figures})


def write(name: str, line: dict[str, Any]) -> None:
    """One line at the end of results/NAME.jsonl."""
    path = HERE / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
