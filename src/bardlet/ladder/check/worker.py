"""The process that runs a learner's file, with limits: `python -m bardlet.ladder.check.worker FOLDER`.

FOLDER has request.json and text.txt; the report goes to report.json there, again after each step. The file may do
anything that its user may do, so `run.py` treats the report as data from a stranger.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError, is_out_of_memory

MEMORY = 2 << 30
"""Bytes that the learner's code may add to the process."""
TRAINING = 0.8
"""Share of the time limit after which no training goes on."""
FILE_SIZE = 64 << 20
"""Bytes that it may write to one file."""


def main() -> int:
    """Check the file of the request and write the report."""
    started, folder = time.monotonic(), Path(sys.argv.pop(1))
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    text = (folder / "text.txt").read_text(encoding="utf-8")
    report = folder / "report.json"
    from bardlet.ladder.check import examine, learning  # noqa: F401  before the limit of memory
    from bardlet.ladder.check.judge import judge
    from bardlet.ladder.check.load import load
    from bardlet.ladder.check.source import read

    def write(value: dict[str, Any]) -> None:
        part = folder / "report.part"
        part.write_text(json.dumps(value), encoding="utf-8")
        os.replace(part, report)

    limit(request["seconds"])
    until = started + TRAINING * request["seconds"]
    last: dict[str, Any] = {}

    def note(state: examine.Report) -> None:
        last.clear()
        last.update(examine.as_json(state))
        write(last)

    write({"doing": "loading the file"})
    try:
        loaded = load(read(Path(request["file"])), text)
        if request["exercise"]:
            note(judge(loaded, request["exercise"], request["rung"], note))
        else:
            note(examine.examine(loaded, request["rung"], request["name"], note, until))
    except BardletError as error:
        write({**last, "error": str(error)})
    except BaseException as error:
        write({**last, "error": _reason(error)})
    os._exit(0)  # threads and exit handlers of the learner's file do not matter


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        return f"it needs more than {MEMORY >> 30} GB of memory"
    if isinstance(error, SystemExit):
        return "it calls exit"
    from bardlet.ladder.check.load import raised

    return raised(error)


def limit(seconds: float) -> None:
    """Limit memory, processor time and the size of files, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the limit of time remains
        return
    limits = {resource.RLIMIT_CPU: int(seconds) * 4 + 10, resource.RLIMIT_FSIZE: FILE_SIZE, resource.RLIMIT_CORE: 0}
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limits[resource.RLIMIT_AS] = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    for kind, most in limits.items():
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    sys.exit(main())
