"""Signals: finish the current step, save, and say how to continue.

A handler only records the signal, so that no step is cut in two; the training loop checks the record between steps.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bardlet.errors import BardletError, quoted


@dataclass
class StopRequest:
    """The request of a signal to stop."""

    number: int = 0
    """The number of the first signal; 0 before it."""
    interruptible: bool = False
    """True while a signal may raise Interrupted: during an evaluation, which has no side effects."""


class Interrupted(BaseException):
    """A signal arrived during an evaluation."""


class Stopped(BardletError):
    """A signal stopped the run, after a save."""

    def __init__(self, run: Path, step: int, number: int):
        command = f"bardlet resume {quoted(run)}"
        super().__init__(f"stopped after step {step}, and saved; continue with `{command}`")
        self.exit_code = 128 + number


@contextmanager
def signals() -> Iterator[StopRequest]:
    """Record the first signal (Ctrl-C, SIGTERM, a closed terminal) in a StopRequest; let a second one act at once.

    Not a second SIGTERM under torchrun: Slurm may send it to all processes, and torchrun passes its own on. Torchrun
    kills a process that takes too long.
    """
    request, torchrun = StopRequest(), "TORCHELASTIC_RUN_ID" in os.environ

    def handle(number: int, frame: object) -> None:
        if request.number and number == signal.SIGTERM and torchrun:
            return
        if request.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.number = number
        with suppress(OSError):  # unbuffered: the buffer may be in use right now; and a terminal may be gone
            os.write(2, b"note: finishing this step and saving; interrupt again to quit now\n")
        if request.interruptible:
            raise Interrupted

    handled = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows; nohup
        handled.append(signal.SIGHUP)
    old = {number: signal.signal(number, handle) for number in handled}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(request: StopRequest, allowed: bool) -> Iterator[None]:
    """Let a signal raise Interrupted inside if `allowed`, also a signal that arrived before."""
    if allowed and request.number:
        raise Interrupted
    request.interruptible = allowed
    try:
        yield
    finally:
        request.interruptible = False
