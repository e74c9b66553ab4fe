"""metrics.jsonl: a line of losses at a time, each with a CRC-32."""

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
    """`line` as JSON whose last key is the CRC-32 of the text before it."""
    text = json.dumps(line)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """One line at the end of metrics.jsonl."""
    text = _with_crc(line)
    with atomic.explain_write_errors(run / "metrics.jsonl", len(text)), open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(text)


def _plain(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl: a step, and numbers by name; None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if sound and all(value is None or isinstance(value, int | float) for value in line.values()) else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl whose CRC fits: a kill can leave half a line at the end, a bad disk another one."""
    path, lines = run / "metrics.jsonl", []
    if not os.path.lexists(path):
        return []
    texts = manifest.inside(run, path.name).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        head, _, crc = text.rpartition(', "crc": "')
        line = _plain(head + "}") if crc[:-2] == f"{zlib.crc32((head + '}').encode()):08x}" else None
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            log.warning("%s: line %d is damaged, and left out", path, number)
    return lines


def cut_metrics(run: Path, step: int, evaluated: int | None = None) -> list[dict[str, Any]]:
    """Drop the lines after `step` (they will be made again), and return those that stay.

    evaluated: the last step whose evaluation stays; None: `step` itself.
    """
    until = step if evaluated is None else evaluated
    lines = [line for line in read_metrics(run) if line["step"] <= (until if "val_loss" in line else step)]
    text = "".join(_with_crc(line) for line in lines)
    atomic.write_text(run / "metrics.jsonl", text)
    return lines
