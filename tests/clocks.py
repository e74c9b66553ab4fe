"""A simulated clock for runs with --minutes: the same on every machine, and without waiting."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest


class Clock:
    """A clock that advances by a fixed time in each training step and evaluation, and not otherwise."""

    def __init__(self, per_step: float = 0.02, per_evaluation: float = 0.004) -> None:
        self.now = 1000.0
        self.per_step, self.per_evaluation = per_step, per_evaluation

    def monotonic(self) -> float:
        """Return seconds, like `time.monotonic`; each call takes a nanosecond, so that no speed is infinite."""
        self.now += 1e-9
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def install(own: Clock, patch: pytest.MonkeyPatch) -> Clock:
    """Make bardlet use the clock `own` in this process, and a fixed speed instead of calibrating the machine."""
    import bardlet.cli.train
    import bardlet.runner  # noqa: F401 (imports every module that reads the clock of a run)
    from bardlet.planning import calibrate, clock
    from bardlet.training import trainer

    step, evaluate = trainer.train_step, trainer.evaluate

    def timed_step(*args: Any) -> tuple[float, float]:
        own.now += own.per_step
        return step(*args)

    def timed_evaluation(*args: Any) -> float:
        own.now += own.per_evaluation
        return evaluate(*args)

    for name, module in list(sys.modules.items()):
        if name.startswith("bardlet.") and getattr(module, "time", None) is time:
            patch.setattr(module, "time", own)
    patch.setattr(trainer, "train_step", timed_step)
    patch.setattr(clock, "train_step", timed_step)
    patch.setattr(trainer, "evaluate", timed_evaluation)
    patch.setattr(calibrate, "calibrate", lambda *_: calibrate.Speed(((5e6, 1e-2), (3e7, 5e-2))))
    return own
