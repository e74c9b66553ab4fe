"""Liveness of peer ranks: each process sends a heartbeat every second, and those that fall silent are noticed.

A collective waits forever for a stopped process, and reports only a closed connection for a killed one. A thread in
rank 0 watches all others, and each of them watches rank 0 and reads its verdict, so the messages grow with the number
of ranks, not with its square. A lost process ends the run within seconds, with a line that names it, so that the
launcher can restart all of them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SILENT_SECONDS = 15.0
"""Seconds without a heartbeat after which a process of this machine counts as lost, unless it is computing: code that
holds Python's lock for long keeps the thread from sending."""

AWAY_SECONDS = 25.0
"""The same for a process on another machine, of which it cannot be seen whether it is computing."""

VERDICT_SECONDS = 3.0
"""Seconds that rank 0 stays to let the others read its verdict: it may be the server of the store."""

BRIEF_SECONDS = 3.0
"""Seconds without a heartbeat after which a process counts as lost if its pid does not exist on this machine. The pid
of a process in another container does not exist here either, but that process still sends heartbeats."""

FROZEN_SECONDS = 5.0
"""Seconds between two checks of the peers that show that this process itself was suspended."""

RESCUE_SECONDS = 25.0
"""Seconds that a process takes at most to save the run before it leaves: a launcher kills it after 30."""

DONE, FAILED = "done", "failed"
"""The last heartbeat of a process that finished, or failed with its own error."""


def store(timeout: timedelta) -> torch.distributed.TCPStore:
    """Return a client of the store that the launcher or rank 0 serves."""
    import torch  # not at the top: a lock imports this module, and the server reads locks long before it needs torch

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def attempt() -> str:
    """Return the restart count of torchrun, which keeps its store, with all old entries, across restarts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def restarted() -> bool:
    """Return True if a launcher starts this process again: torchrun after a failure, Slurm after queueing again."""
    return attempt() != "0" or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def launch() -> str:
    """Return an id of the launch, equal on all ranks and across restarts: of a Slurm job, or of torchrun."""
    if job := os.environ.get("SLURM_JOB_ID"):  # a job that is queued again keeps it
        return f"slurm {job}"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return f"torchrun {os.environ['TORCHELASTIC_RUN_ID']}"  # the address may change when machines come and go
    names = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"]
    one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"  # then torchrun's pid identifies it, too
    return " ".join([*(os.environ.get(name, "-") for name in names), *([str(os.getppid())] if one_machine else [])])


class Heartbeat(threading.Thread):
    """A thread that sends heartbeats, and ends this process when a peer is lost."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(daemon=True)
        self.rank, self.world = rank, world
        # a separate client: the process group's store may be blocked, waiting for a peer
        self.store = store(timedelta(seconds=SILENT_SECONDS))
        self.prefix = f"bardlet/{attempt()}"
        self.ended = threading.Event()
        self.rescue: Callable[[], object] | None = None
        """Saves what would be lost, before this process leaves; called in a thread of its own."""
        self._leaving = threading.Lock()
        self.seen: dict[int, tuple[str, float]] = {}
        """The last heartbeat of each peer, and the time it arrived."""
        self.worked: dict[int, int] = {}
        """The processor time of peers on this machine at the last check, in clock ticks."""
        self.heard = time.monotonic()
        """The time of the store's last answer."""
        self.checked = self.heard
        """The time of the last check of the peers."""
        self.beats = 0
        self.beat()

    def run(self) -> None:
        """Send a heartbeat and check the peers every second until `close`."""
        while not self.ended.wait(1.0):
            self.beat()
            self.check_peers()

    def beat(self) -> None:
        """Send a heartbeat."""
        self.beats += 1
        with suppress(RuntimeError):
            self._send(f"{os.getpid()} {socket.gethostname()} {self.beats}")

    def check_peers(self) -> None:
        """End this process, with a line that names the peer, if a peer is lost."""
        now = time.monotonic()
        if now - self.checked > FROZEN_SECONDS:  # this process was suspended, perhaps all were: ignore the silence
            self.seen, self.heard = {}, now
        self.checked = now
        if verdict := self._read("verdict"):
            self._leave(verdict)
        for rank in range(1, self.world) if self.rank == 0 else (0,):
            if why := self._lost(rank):
                self._leave(f"process {rank} of {self.world} {why}")
        if time.monotonic() - self.heard > SILENT_SECONDS:
            self._leave("the launcher, or process 0, is gone")

    def wait(self, seconds: float) -> None:
        """Check the peers for up to `seconds`: if one of them caused an error, this ends the process."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check_peers()
            time.sleep(0.2)

    def close(self, word: str) -> None:
        """Stop the heartbeats, with `word` (DONE or FAILED) as the last one."""
        self.ended.set()
        self.join(SILENT_SECONDS)  # the thread must not send anything after the last word
        with suppress(RuntimeError):
            self._send(word)

    def _send(self, word: str) -> None:
        self.store.set(f"{self.prefix}/{self.rank}", word)

    def _lost(self, rank: int) -> str | None:
        """Return why the process `rank` counts as lost; None if it does not."""
        now, word = time.monotonic(), self._read(str(rank))
        before, since = self.seen.get(rank, ("", now))
        if word and word != before:
            before, since = word, now
        self.seen[rank] = before, since
        if before == DONE:
            return None
        if before == FAILED:
            return "failed with an error of its own"
        silent = now - since
        if not before:
            return "never connected" if silent > SILENT_SECONDS else None
        pid, host, _ = before.split()
        name = f"(pid {pid} on {host})"
        same_host = host == socket.gethostname()
        works = same_host and self._works(rank, int(pid))
        if silent > BRIEF_SECONDS and same_host and not alive(int(pid)):
            return f"{name} was killed"
        if silent <= (SILENT_SECONDS if same_host else AWAY_SECONDS):
            return None
        if works:
            return None
        if same_host and _stat(int(pid))[:2] == ["T", str(os.getppid())]:
            os.kill(int(pid), signal.SIGKILL)  # its launcher would send SIGTERM and wait for half a minute
            return f"{name} was stopped {SILENT_SECONDS:g} s ago and is now killed"
        return f"{name} has been silent for {silent:.0f} s: stopped or disconnected"

    def _read(self, name: str) -> str:
        """Return an entry of the store; empty if there is none, or if the store does not answer."""
        key, word = f"{self.prefix}/{name}", ""
        with suppress(RuntimeError):
            word = self.store.get(key).decode() if self.store.check([key]) else ""
            self.heard = time.monotonic()
        return word

    def _works(self, rank: int, pid: int) -> bool:
        """Return True if a process of this machine has computed since the last call for it."""
        fields = _stat(pid)
        ticks = sum(map(int, fields[11:13])) if fields[:1] != ["T"] else 0  # in user and in system code
        before, self.worked[rank] = self.worked.get(rank, ticks), ticks
        return ticks > before

    def _leave(self, why: str) -> None:
        self._leaving.acquire()  # another thread that comes here ends with the process
        if self.rank == 0:
            with suppress(RuntimeError):
                self.store.set(f"{self.prefix}/verdict", why)
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > int(attempt())
        print(f"bardlet: {why}; " + ("torchrun restarts all processes" if restarts else
                                     "restart all processes: `bardlet resume` continues from the newest checkpoint"),
              file=sys.stderr, flush=True)
        read_by = time.monotonic() + VERDICT_SECONDS
        if self.rescue is not None:
            rescuer = threading.Thread(target=self.rescue, daemon=True)
            rescuer.start()
            rescuer.join(RESCUE_SECONDS)
        if self.rank == 0:
            time.sleep(max(0.0, read_by - time.monotonic()))
        os._exit(1)  # another thread may wait forever inside a collective


def alive(pid: int) -> bool:
    """Return True if a process of this machine is running or stopped; a zombie is not alive."""
    if stat := _stat(pid):
        return stat[0] not in "ZX"
    if os.name == "nt":  # os.kill would kill it there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _stat(pid: int) -> list[str]:
    """Return /proc/PID/stat from the state on (T: stopped; the parent's pid follows); empty where there is no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return []


def is_peer_failure(error: BaseException) -> bool:
    """Return True if another process may have caused this error of a collective."""
    signs = ("onnection", "roken pipe", "gloo", "NCCL", "timed out", "Timed out")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
