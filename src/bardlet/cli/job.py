"""`python -m bardlet.cli.job FOLDER`: run a command for the studio, and record its exit code.

The folder's job.json names the command. The folder's lock is held meanwhile, so that a server finds the process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bardlet import cli
from bardlet.run import lock
from bardlet.runtime import atomic


def main(folder: Path) -> int:
    """Run the command and return its exit code."""
    words = json.loads((folder / "job.json").read_text(encoding="utf-8"))["command"]
    with lock.locked(folder):
        code = cli.main([str(word) for word in words])
        atomic.write_text(folder / "end.json", json.dumps({"code": code, "ended": time.time()}))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
