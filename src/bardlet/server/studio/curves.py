"""The losses of a run as points of a chart: read on from where the last look ended, and thinned out for a screen."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bardlet.errors import BardletError
from bardlet.runtime import manifest

POINTS = 1500
"""Points of a line: more than a screen has pixels for."""


@dataclass
class Line:
    """The values of one figure: `steps[i]` is the step of `values[i]`."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append a point. A run that resumes writes steps again: they replace those it wrote before."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)

    def thinned(self, most: int = POINTS) -> list[tuple[int, float]]:
        """Return at most about `most` points: of each stretch of steps the last step and the mean value.

        The first and the last point are always as they were.
        """
        number = len(self.steps)
        if number <= most:
            return list(zip(self.steps, self.values, strict=True))
        width = -(-(number - 2) // (most - 2))
        points = [(self.steps[0], self.values[0])]
        for start in range(1, number - 1, width):
            stop = min(start + width, number - 1)
            points.append((self.steps[stop - 1], sum(self.values[start:stop]) / (stop - start)))
        return [*points, (self.steps[-1], self.values[-1])]


class Curve:
    """The lines of a run's metrics.jsonl."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._clear()

    def _clear(self) -> None:
        self.lines: dict[str, Line] = {}
        self.last: dict[str, Any] = {}
        """The newest line with a training loss."""
        self._offset, self._head, self._identity = 0, b"", (0, 0)

    def read(self) -> None:
        """Read what was appended. A file that was replaced or cut is read anew."""
        try:
            path = manifest.inside(self.run, "metrics.jsonl")
            file = open(path, "rb")  # noqa: SIM115
        except (OSError, BardletError):
            self._clear()
            return
        with file:
            head = file.read(256)
            size = file.seek(0, 2)
            if size < self._offset or not head.startswith(self._head[: len(head)]):
                self._clear()
            self._head = head
            file.seek(self._offset)
            data = file.read(size - self._offset)
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for text in whole.splitlines():
            self._add(text)

    def _add(self, text: bytes) -> None:
        head, _, crc = text.rpartition(b', "crc": "')
        if crc[:-2] != b"%08x" % zlib.crc32(head + b"}"):
            return
        line = json.loads(head + b"}")
        step = line.pop("step")
        if line.get("train_loss") is not None:
            self.last = {"step": step, **line}
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self.lines.setdefault(name, Line()).add(step, float(value))

    @property
    def version(self) -> int:
        """A number that changes when there are new points."""
        return self._offset

    @property
    def step(self) -> int:
        """The last step with a figure."""
        return max((line.steps[-1] for line in self.lines.values() if line.steps), default=0)

    def points(self, *names: str) -> dict[str, list[tuple[int, float]]]:
        """Return the thinned lines of these figures, as far as there are any."""
        return {name: self.lines[name].thinned() for name in names if name in self.lines}
