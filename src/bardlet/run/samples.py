"""samples.jsonl: a text of the model after each evaluation, one JSON line each."""

from __future__ import annotations

import json
from pathlib import Path

from bardlet.runtime import atomic

NAME = "samples.jsonl"


def _line(step: int, text: str) -> str:
    return json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n"


def append(run: Path, step: int, text: str) -> None:
    """Append the sample after `step`."""
    line = _line(step, text)
    with atomic.explain_write_errors(run / NAME, len(line)), open(run / NAME, "a", encoding="utf-8") as f:
        f.write(line)


def read(run: Path, most: int | None = None) -> list[tuple[int, str]]:
    """Return the samples as (step, text), the last `most` of them. Lines that a kill cut are left out."""
    path = run / NAME
    if path.is_symlink() or not path.is_file():
        return []
    samples = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines()[-most if most else None :]:
        try:
            line = json.loads(text)
            samples.append((int(line["step"]), str(line["text"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return samples


def cut(run: Path, step: int) -> None:
    """Remove the samples after `step`, which the run will write again."""
    if (run / NAME).is_file():
        atomic.write_text(run / NAME, "".join(_line(*sample) for sample in read(run) if sample[0] <= step))
