"""A clock for runs with --minutes: they are the same on every machine, however busy, and no test waits for them."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest


class Clock:
    """Time that passes in training steps and evaluations alone, and as much in each as the test says."""

    def __init__(self, per_step: float = 0.02, per_evaluation: float = 0.004) -> None:
        self.now = 1000.0
        self.per_step, self.per_evaluation = per_step, per_evaluation

    def monotonic(self) -> float:
        """Seconds, as `time.monotonic` would say; a nanosecond goes by, so that no speed is infinite."""
        self.now += 1e-9
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def install(own: Clock, patch: pytest.MonkeyPatch) -> Clock:
    """Have bardlet look at `own` in this process. The speed of the machine counts as known: nothing is calibrated."""
    import bardlet.cli.train
    import bardlet.runner  # noqa: F401 (with the command, every module that looks at the clock of a run)
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
