"""Who of several processes is still there. Each tells the others so once a second, and notices who falls silent.

A collective waits for ever for a process that was stopped, and of one that was killed it says only that a connection
was closed. A thread of each process watches the others, so that the run ends in seconds with a line that names the one
to blame, and its launcher can start it again.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch

SILENT_SECONDS = 15.0
"""Seconds without a sign of life after which a process counts as lost."""

BRIEF_SECONDS = 3.0
"""Seconds after which one that is not among this machine's processes counts as lost: in another container it is not,
either, but speaks."""

FROZEN_SECONDS = 5.0
"""Seconds between two looks that show that this process itself stood still."""

DONE, FAILED = "done", "failed"
"""What a process leaves as its last word: that it finished, or that it ended with an error of its own."""


def store(timeout: timedelta) -> torch.distributed.TCPStore:
    """A client of the store that the launcher, or rank 0, serves."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def attempt() -> str:
    """How often torchrun has started these processes again: it keeps its store, with all that the last ones said."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def launch() -> str:
    """Which torchrun started these processes: the same one for all of them, and each time it starts them again."""
    names = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"]
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"  # on one machine its number tells, too
    return " ".join([*(os.environ.get(name, "-") for name in names), *([str(os.getppid())] if alone else [])])


class Heartbeat(threading.Thread):
    """Tells the others that this process lives, and ends it when one of them does not."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(daemon=True)
        self.rank, self.world = rank, world
        # a client of its own: the store that the process group has may be waiting for somebody
        self.store = store(timedelta(seconds=SILENT_SECONDS))
        self.prefix = f"bardlet/{attempt()}"
        self.ended = threading.Event()
        self.seen: dict[int, tuple[str, float]] = {}
        """What each of the others said last, and when that was new."""
        self.heard = time.monotonic()
        """When the store answered last."""
        self.looked = self.heard
        """When this process looked at the others last."""
        self.beats = 0
        self.beat()

    def run(self) -> None:
        """Until `close`: a sign of life each second, and a look at the others."""
        while not self.ended.wait(1.0):
            self.beat()
            self.check_peers()

    def beat(self) -> None:
        """A sign of life."""
        self.beats += 1
        with suppress(RuntimeError):
            self._say(f"{os.getpid()} {socket.gethostname()} {self.beats}")

    def check_peers(self) -> None:
        """End this process, with a line that names the other, where one is lost."""
        now = time.monotonic()
        if now - self.looked > FROZEN_SECONDS:  # this process was stopped, perhaps all were: nobody's silence counts
            self.seen, self.heard = {}, now
        self.looked = now
        for rank in range(self.world):
            if rank != self.rank and (why := self._lost(rank)):
                self._leave(f"process {rank} of {self.world} {why}")
        if time.monotonic() - self.heard > SILENT_SECONDS:
            self._leave("the process that started this one, or process 0, is gone")

    def wait(self, seconds: float) -> None:
        """Give `look` so much time to find out who is to blame for an error: it ends this process when it does."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check_peers()
            time.sleep(0.2)

    def close(self, word: str) -> None:
        """Fall silent; `word` says why."""
        self.ended.set()
        self.join(SILENT_SECONDS)  # its last sign of life must not come after the last word
        with suppress(RuntimeError):
            self._say(word)

    def _say(self, word: str) -> None:
        self.store.set(f"{self.prefix}/{self.rank}", word)

    def _lost(self, rank: int) -> str | None:
        """Why the process `rank` counts as lost, in words."""
        now, word = time.monotonic(), ""
        with suppress(RuntimeError):
            key = f"{self.prefix}/{rank}"
            word = self.store.get(key).decode() if self.store.check([key]) else ""
            self.heard = now
        before, since = self.seen.get(rank, ("", now))
        if word and word != before:
            before, since = word, now
        self.seen[rank] = before, since
        if before == DONE:
            return None
        if before == FAILED:
            return "ended with an error of its own"
        silent = now - since
        if not before:
            return "was lost on its way here" if silent > SILENT_SECONDS else None
        pid, host, _ = before.split()
        who = f"(pid {pid} on {host})"
        here = host == socket.gethostname()
        if silent > BRIEF_SECONDS and here and not alive(int(pid)):
            return f"{who} was killed"
        if silent <= SILENT_SECONDS:
            return None
        if here and _facts(int(pid))[:2] == ["T", str(os.getppid())]:
            os.kill(int(pid), signal.SIGKILL)  # its launcher would ask it to end, and wait for half a minute
            return f"{who} was stopped {SILENT_SECONDS:g} s ago, and is ended"
        return f"{who} has been silent for {SILENT_SECONDS:g} s: stopped, or cut off"

    def _leave(self, why: str) -> None:
        again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > int(attempt())
        print(f"bardlet: {why}; " + ("torchrun starts all of them again" if again else
                                     "start all of them again: `bardlet resume` goes on from the newest checkpoint"),
              file=sys.stderr, flush=True)
        os._exit(1)  # another thread may wait for ever inside a collective


def alive(pid: int) -> bool:
    """Whether a process of this machine runs, or could: one that nobody has buried yet does not."""
    if facts := _facts(pid):
        return facts[0] not in "ZX"
    if os.name == "nt":  # where to ask in this way is to kill
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _facts(pid: int) -> list[str]:
    """What Linux says of a process, from its state on (T: stopped; then its parent's number); empty elsewhere."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return []


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error of a collective may be the fault of another process."""
    signs = ("onnection", "roken pipe", "gloo", "NCCL", "timed out", "Timed out")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
