"""Commands whose output a page waits for: the plan of a training, the doctor, an export. Each is a process."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet.server.errors import Refusal, public_message
from bardlet.server.studio.jobs import ISOLATED, environment

MOST_OUTPUT = 1 << 20
"""Bytes of output that are kept."""


@dataclass(frozen=True)
class Output:
    """The output of a command. value: its --json; lines: the others; notes: those of standard error."""

    value: dict[str, Any]
    lines: list[str]
    notes: list[str]


async def run(words: Sequence[str], directory: Path, seconds: float, folders: Iterable[str] = ()) -> Output:
    """Run `bardlet WORDS --json` and return its output. The process ends if this call is cancelled.

    Raises:
        Refusal: the command failed, with its message (400); it took too long (503).
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, *ISOLATED, "-m", "bardlet", *words, "--json", cwd=directory, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment())
    try:
        async with asyncio.timeout(seconds):
            output, errors = await process.communicate()
    except TimeoutError:
        raise Refusal(503, "This takes too long here; try it in a terminal.", type="server_error",
                      code="too_slow") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    lines = output[-MOST_OUTPUT:].decode("utf-8", "replace").splitlines()
    notes = errors[-MOST_OUTPUT:].decode("utf-8", "replace").splitlines()
    value: Any = None
    with suppress(ValueError, IndexError):
        value = json.loads(lines[-1])
    if process.returncode and not isinstance(value, dict):  # the doctor's findings come with an exit code
        last = next((line for line in reversed(notes) if line.startswith("bardlet: ")), "the command failed")
        raise Refusal(400, public_message(ValueError(last.removeprefix("bardlet: ")), folders), code="command_failed")
    return Output(value if isinstance(value, dict) else {}, lines[:-1] if isinstance(value, dict) else lines, notes)
