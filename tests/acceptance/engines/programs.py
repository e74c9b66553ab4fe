"""Run the programs of the engines, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any


def run(*command: object, request: Any, **environment: str) -> dict[str, Any]:
    """Run a program that reads a request and writes its answer in the last line."""
    done = subprocess.run([str(word) for word in command], input=json.dumps(request), capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
