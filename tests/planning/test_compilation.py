"""Compilation of a run by several processes: all compile, or none does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bardlet.planning import clock, compilation
from bardlet.runtime import compiler
from bardlet.runtime.distributed import Dist


class OneOfTwo(Dist):
    """A process of two; `other` is what the other one answers each time."""

    other = 0

    def all_max(self, value: int) -> int:
        return max(value, self.other)


@pytest.mark.parametrize(("place", "other", "on"), [(None, 0, True), ("alone", 0, False), ("step", 0, False),
                                                    (None, 1, False)])
def test_all_processes_compile_or_none(place: str | None, other: int, on: bool, monkeypatch: pytest.MonkeyPatch,
                                       caplog: pytest.LogCaptureFixture) -> None:
    """The compiler fails here, alone or in a training step, or in the other process; a failure here is named."""
    calls: list[Any] = []

    def fails(at: str) -> None:
        calls.append(at)
        if at == place:
            raise RuntimeError("no space left\nin the folder")

    monkeypatch.setattr(compiler, "try_compiler", lambda device: fails("alone"))
    monkeypatch.setattr(clock, "seconds_per_step", lambda *_: fails("step"))
    monkeypatch.setattr(compiler, "compile_blocks", lambda model, on=True, widths=False: calls.append(on))
    dist = OneOfTwo(0, 2, torch.device("cpu"))
    object.__setattr__(dist, "other", other)
    trainer: Any = SimpleNamespace(dist=dist, model=None, config=SimpleNamespace(rows_vary=False))
    assert compilation._compile(trainer) == on
    assert calls == {None: ["alone", True, "step"] if on else ["alone", False], "alone": ["alone", False],
                     "step": ["alone", True, "step", False]}[place]
    assert ("torch.compile failed (RuntimeError: no space left)" in caplog.text) == (place is not None)


def test_a_process_alone_does_not_try_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(compiler, "try_compiler", lambda device: calls.append("alone"))
    monkeypatch.setattr(clock, "seconds_per_step", lambda *_: calls.append("step"))
    monkeypatch.setattr(compiler, "compile_blocks", lambda *args, **options: calls.append("blocks"))
    trainer: Any = SimpleNamespace(dist=Dist(0, 1, torch.device("cpu")), model=None,
                                   config=SimpleNamespace(rows_vary=False))
    assert compilation._compile(trainer)
    assert calls == ["blocks", "step"]
