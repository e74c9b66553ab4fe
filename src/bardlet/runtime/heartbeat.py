"""Liveness of peer ranks: each process sends a heartbeat every second, and those that fall silent are noticed.

A collective waits forever for a stopped process, and reports only a closed connection for a killed one. A thread in
rank 0 watches all others, and each of them watches rank 0 and reads its verdict, so the messages grow with the number
of ranks, not with its square. A lost process ends the run within seconds, with a line that names it, so that the
launcher can restart all of them.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
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

CLOSED_SECONDS = 6.0
"""The same for a process on another machine, after an error of a collective: probably its connection was closed."""

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


def keeps_store() -> bool:
    """Return True if torchrun serves the store, and keeps it, with all old entries, when it restarts the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """Return the number of restarts that the torchrun of this machine counts: on several machines, each its own."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def on_several_machines() -> bool:
    """Return True if torchrun runs on several machines."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


_agreed: list[str] = []
"""The id on which `agree` agreed."""


def attempt() -> str:
    """Return an id of this start of the processes, equal on all of them, which old entries of the store lack."""
    return (_agreed or [str(restarts())])[0] if keeps_store() else "0"


def agree(rank: int, world: int, timeout: timedelta) -> str:
    """Agree with all other processes on the id of this start, and return it.

    The launchers of several machines count differently: one that was started anew has counted nothing, and one that
    only heard of a failure does not count it. Each process publishes an id of its own, and rank 0 answers to it with
    the common one; only a process of this start can confirm that.
    """
    entries, own, until = store(timeout), uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    common = own if rank == 0 else _answer(entries, rank, own)
    _agreed[:] = [common]
    waiting = set(range(1, world)) if rank == 0 else set()
    while waiting:
        if time.monotonic() > until:
            raise RuntimeError(f"timed out: process {min(waiting)} did not start")
        for other in sorted(waiting):
            if entries.check([f"bardlet/start/{other}"]):
                entries.set(f"bardlet/answer/{entries.get(f'bardlet/start/{other}').decode()}", common)
            if entries.check([f"bardlet/confirmed/{common}/{other}"]):
                waiting.remove(other)
        time.sleep(0.05)
    return common


def _answer(entries: torch.distributed.TCPStore, rank: int, own: str) -> str:
    """Return rank 0's answer to this process, which publishes its id `own`, and confirm it."""
    entries.set(f"bardlet/start/{rank}", own)
    common: str = entries.get(f"bardlet/answer/{own}").decode()
    entries.set(f"bardlet/confirmed/{common}/{rank}", "")
    return common


def restarted() -> bool:
    """Return True if a launcher may have started this process before: torchrun, or Slurm after queueing again.

    The torchrun of a machine that joins the others again cannot know of it.
    """
    return restarts() > 0 or on_several_machines() or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def launch() -> str:
    """Return an id of the launch, equal on all ranks and across restarts: of a Slurm job, or of torchrun.

    On several machines it is --rdzv-id and the command, so that the same command, started again, finds its run.
    """
    if job := os.environ.get("SLURM_JOB_ID"):  # a job that is queued again keeps it
        return f"slurm {job}"
    if on_several_machines() and os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        command = hashlib.sha256("\0".join(sys.argv[1:]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return f"torchrun {os.environ['TORCHELASTIC_RUN_ID']} {command}"  # the address may change
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
        self.ended, self.closed = threading.Event(), threading.Event()
        """Set when the last word is to be sent, and when it was."""
        self.leaving = threading.Lock()
        """Held by the thread that ends this process."""
        self.error = False
        """True after an error of a collective."""
        self.cut_off = False
        """True after an error of the store, whose client never connects again and prints a warning at each call."""
        self.rescue: Callable[[], object] | None = None
        """Saves what would be lost, before this process leaves; called in a thread of its own."""
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
        threading.Thread(target=self._watch_store, daemon=True).start()
        while not self.ended.wait(1.0):
            self.beat()
            self.check_peers()

    def beat(self) -> None:
        """Send a heartbeat."""
        self.beats += 1
        self._write(str(self.rank), f"{os.getpid()} {socket.gethostname()} {self.beats}")

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
                verdict = f"process {rank} of {self.world} {why}"
                if self.rank == 0:
                    self._write("verdict", verdict)
                self._leave(verdict)
        self._check_store()

    def _check_store(self) -> None:
        """End this process if the store, which is on the machine of rank 0, has been silent for too long."""
        silent = time.monotonic() - self.heard
        if silent <= SILENT_SECONDS:
            return
        pid, host, *_ = [*self.seen.get(0, ("", 0.0))[0].split(), "", ""]
        if host in ("", socket.gethostname()):
            self._leave("the launcher, or process 0, is gone")
        self._leave(f"process 0 of {self.world} (pid {pid} on {host}), or its launcher, has been silent for "
                    f"{silent:.0f} s: killed, stopped or disconnected")

    def _watch_store(self) -> None:
        """Check the store every second until `close` is done: a call waits for hours if the network is cut."""
        now = time.monotonic()
        while not self.closed.wait(1.0):
            before, now = now, time.monotonic()
            if now - before > FROZEN_SECONDS:  # as in check_peers
                self.heard = now
            self._check_store()

    def wait(self, seconds: float) -> None:
        """Check the peers for up to `seconds` after an error of a collective: if one of them caused it, end."""
        self.error = True
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check_peers()
            time.sleep(0.2)

    def close(self, word: str) -> None:
        """Stop the heartbeats, with `word` (DONE or FAILED) as the last one."""
        self.ended.set()
        self.join(SILENT_SECONDS)  # the thread must not send anything after the last word
        self._write(str(self.rank), word)
        self.closed.set()
        if word == FAILED and self.rank == 0 and not keeps_store():
            time.sleep(VERDICT_SECONDS)

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
        if silent <= (SILENT_SECONDS if same_host else CLOSED_SECONDS if self.error else AWAY_SECONDS):
            return None
        if works:
            return None
        if same_host and _stat(int(pid))[:2] == ["T", str(os.getppid())]:
            os.kill(int(pid), signal.SIGKILL)  # its launcher would send SIGTERM and wait for half a minute
            return f"{name} was stopped {SILENT_SECONDS:g} s ago and is now killed"
        return f"{name} has been silent for {silent:.0f} s: {'' if same_host else 'killed, '}stopped or disconnected"

    def _read(self, name: str) -> str:
        """Return an entry of the store; empty if there is none, or if the store does not answer."""
        key, word = f"{self.prefix}/{name}", ""
        if not self.cut_off:
            try:
                word = self.store.get(key).decode() if self.store.check([key]) else ""
                self.heard = time.monotonic()
            except RuntimeError:
                self.cut_off = True
        return word

    def _write(self, name: str, word: str) -> None:
        """Write an entry of the store, if it still answers."""
        if not self.cut_off:
            try:
                self.store.set(f"{self.prefix}/{name}", word)
            except RuntimeError:
                self.cut_off = True

    def _works(self, rank: int, pid: int) -> bool:
        """Return True if a process of this machine has computed since the last call for it."""
        fields = _stat(pid)
        ticks = sum(map(int, fields[11:13])) if fields[:1] != ["T"] else 0  # in user and in system code
        before, self.worked[rank] = self.worked.get(rank, ticks), ticks
        return ticks > before

    def _leave(self, why: str) -> None:
        with self.leaving:
            again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > restarts()
            then = ("torchrun restarts all processes" if again else
                    "restart all processes: `bardlet resume` continues from the newest checkpoint")
            print(f"bardlet: {why}; {then}", file=sys.stderr, flush=True)
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
