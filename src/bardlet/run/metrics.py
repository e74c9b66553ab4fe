"""metrics.jsonl: one JSON line of losses at a time, each with a CRC-32."""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

from bardlet.runtime import atomic, manifest

log = logging.getLogger("bardlet")


def _with_crc(line: dict[str, Any]) -> str:
    """Return `line` as JSON whose last key is the CRC-32 of the JSON without it."""
    text = json.dumps(line)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl."""
    path, text = run / "metrics.jsonl", _with_crc(line)
    with atomic.explain_write_errors(path, len(text)), open(path, "a", encoding="utf-8") as f:
        f.write(text)


def _parse(text: str) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl: a step, and numbers by name; return None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if valid and all(value is None or isinstance(value, int | float) for value in line.values()) else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl whose CRC matches, and warn of the others.

    A partial last line gets no warning: a kill leaves one.
    """
    path, lines = run / "metrics.jsonl", []
    if not os.path.lexists(path):
        return []
    texts = manifest.inside(run, path.name).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        head, _, crc = text.rpartition(', "crc": "')
        line = _parse(head + "}") if crc[:-2] == f"{zlib.crc32((head + '}').encode()):08x}" else None
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            log.warning("%s: line %d is damaged; skipping it", path, number)
    return lines


def cut_metrics(run: Path, step: int, evaluated: int | None = None) -> list[dict[str, Any]]:
    """Remove the lines after `step`, which the run will write again, and return the others.

    Args:
        run: the run folder.
        step: the last step whose training loss to keep.
        evaluated: the last step whose validation loss to keep; None: `step`.
    """
    until = step if evaluated is None else evaluated
    lines = [line for line in read_metrics(run) if line["step"] <= (until if "val_loss" in line else step)]
    text = "".join(_with_crc(line) for line in lines)
    atomic.write_text(run / "metrics.jsonl", text)
    return lines
