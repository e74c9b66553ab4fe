"""The addition exercise as a user runs it: 1,000 three-digit sums outside the training split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "exercises" / "addition.py"


def test_unseen_sums_are_exact(record_property: Callable[[str, object], None]) -> None:
    """At least 99 % of the answers on the test set have all digits right."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, encoding="utf-8",
                          timeout=20 * 60, env={"GOMP_SPINCOUNT": "2000", **os.environ})
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    figures = json.loads(done.stdout.splitlines()[-1])
    record_property("seconds", figures["seconds"])
    assert (figures["of"], figures["digits"]) == (1000, 3)
    assert figures["accuracy"] >= 0.99
