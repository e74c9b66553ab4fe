"""What a signal asks of a run: to finish what is under way, to save, and to say how to go on.

A signal is only noted when it comes, so that no step is cut in two; the loop looks at the note between its steps.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bardlet.errors import BardletError


@dataclass
class StopRequest:
    """What signals have asked for."""

    number: int = 0
    """Of the first signal; 0 before."""
    breakable: bool = False
    """Whether a signal may break off what is under way, by raising BrokenOff: an evaluation, which leaves no trace."""


class Interrupted(BaseException):
    """A signal came in an evaluation."""


class Stopped(BardletError):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, run: Path, step: int, number: int):
        super().__init__(f"stopped after step {step}, and saved; go on with `bardlet resume {run}`")
        self.exit_code = 128 + number


@contextmanager
def signals() -> Iterator[StopRequest]:
    """What a signal asks for (Ctrl-C, SIGTERM, a terminal that is closed) is noted here; a second one acts at once."""
    asked = StopRequest()

    def note(number: int, frame: object) -> None:
        if asked.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.number = number
        with suppress(OSError):  # not by way of a buffer that may be in use just now; and a terminal may be gone
            os.write(2, b"note: finishing what is under way and saving; once more to leave at once\n")
        if asked.breakable:
            raise Interrupted

    heard = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows; nohup
        heard.append(signal.SIGHUP)
    old = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(asked: StopRequest, may_break: bool) -> Iterator[None]:
    """Inside, a signal raises BrokenOff at once, also one that came before; where it may."""
    if may_break and asked.number:
        raise Interrupted
    asked.breakable = may_break
    try:
        yield
    finally:
        asked.breakable = False
