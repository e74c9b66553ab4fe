"""Training jobs: commands that run one after the other, each in a process of its own that outlives the server.

A job is a folder: job.json (the command), log.txt (what it printed), end.json (its exit code). The process holds the
lock of the folder while it runs, so that another server finds it again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bardlet.run import lock
from bardlet.runtime import atomic, heartbeat
from bardlet.server.errors import Refusal
from bardlet.server.studio.commands import shown

log = logging.getLogger("bardlet")

State = Literal["waiting", "running", "done", "failed", "stopped", "interrupted"]
POLL_SECONDS = 0.5
STARTED, STOPPING = "started", "stopping"
"""Files: the job's process was started, with its id, and was told to stop. A second signal would end it without saving.
"""
STARTING_SECONDS = 30
"""Time that a process gets to import bardlet and to lock its folder."""
ISOLATED = ("-P",)
"""Options of Python for a process of ours: it imports no module from the working directory, which is the user's."""
TAIL = 16_384
"""Bytes at the end of a log that are shown."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a run that was told to stop; it is saved."""
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}")


@dataclass(frozen=True)
class Job:
    """A job. run: the name of its run folder. created, started, ended: in seconds since 1970. code: the exit code."""

    id: str
    command: tuple[str, ...]
    run: str
    kind: str
    created: float
    state: State
    started: float | None = None
    code: int | None = None
    ended: float | None = None
    stopping: bool = False
    """It was told to stop, and is saving."""
    message: str = ""
    """The last line of the log if it failed."""

    def as_json(self) -> dict[str, Any]:
        """Return the job as the page gets it."""
        return {**asdict(self), "command": shown(list(self.command))}


class Jobs:
    """The jobs in a folder. `run` starts those that wait, one after the other."""

    def __init__(self, folder: Path, directory: Path) -> None:
        """directory: the working directory of the commands."""
        self.folder, self.directory = folder, directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._changed = asyncio.Event()
        self._ended: dict[str, Job] = {}
        """Jobs that have ended, which change no more."""

    # ---------------------------------------------------------------- for the routes

    def add(self, command: Sequence[str], run: str, kind: str) -> Job:
        """Queue a command, without `bardlet`."""
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        folder = self.folder / name
        folder.mkdir(parents=True)
        about = {"command": list(command), "run": run, "kind": kind, "created": time.time()}
        atomic.write_text(folder / "job.json", json.dumps(about))
        return self.get(name)

    def get(self, name: str) -> Job:
        """Return a job. Refuse a name that none has."""
        job = self._read(name) if ID.fullmatch(name) else None
        if job is None:
            raise Refusal(404, "There is no such job.", code="job_not_found")
        return job

    def all(self) -> list[Job]:
        """Return the jobs, the newest first."""
        try:
            names = sorted((name for name in os.listdir(self.folder) if ID.fullmatch(name)), reverse=True)
        except OSError:
            return []
        return [job for name in names if (job := self._read(name)) is not None]

    def log(self, name: str) -> str:
        """Return the end of what a job printed."""
        return _end_of(self.folder / self.get(name).id / "log.txt")

    def stop(self, name: str) -> Job:
        """Tell a running job to save and to end; take a waiting one out of the queue."""
        job = self.get(name)
        if job.state == "waiting":
            self._end(name, 128 + signal.SIGINT)
        elif job.state == "running" and not job.stopping and (process := self._process(name)) is not None:
            (self.folder / name / STOPPING).touch()
            with suppress(ProcessLookupError, PermissionError):
                # not SIGINT: a server that a script started in the background ignores it, and so do its children
                os.kill(process, getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        return self.get(name)

    # ---------------------------------------------------------------- the queue

    async def run(self) -> None:
        """Start waiting jobs, as long as the server runs."""
        while True:
            try:
                await asyncio.to_thread(self.start_next)
            except Exception:
                log.exception("internal error in the queue of the studio")
            await asyncio.sleep(POLL_SECONDS)

    def start_next(self) -> None:
        """Start the oldest waiting job, if none runs."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._processes[name]
        jobs = self.all()
        if any(job.state == "running" for job in jobs):
            return
        waiting = [job for job in jobs if job.state == "waiting"]
        if waiting:
            self._start(waiting[-1])

    def _start(self, job: Job) -> None:
        folder = self.folder / job.id
        detached: dict[str, Any] = {"start_new_session": True}  # neither Ctrl-C nor the end of the server reaches it
        if sys.platform == "win32":
            detached = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS}
        with open(folder / "log.txt", "ab") as output:
            (folder / STARTED).touch()
            process = self._processes[job.id] = subprocess.Popen(
                [sys.executable, *ISOLATED, "-m", "bardlet.cli.job", str(folder.resolve())], cwd=self.directory,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment(), **detached)
        (folder / STARTED).write_text(str(process.pid))

    # ---------------------------------------------------------------- one job

    def _read(self, name: str) -> Job | None:
        """Return the job of a folder; None for one without a command."""
        if name in self._ended:
            return self._ended[name]
        folder = self.folder / name
        about, end = _object(folder / "job.json"), _object(folder / "end.json")
        if not isinstance(about.get("command"), list):
            return None
        facts: dict[str, Any] = {"id": name, "command": tuple(map(str, about["command"])),
                                 "run": str(about.get("run", "")), "kind": str(about.get("kind", "")),
                                 "created": float(about.get("created", 0)), "started": None}
        with suppress(OSError):
            facts["started"] = (folder / STARTED).stat().st_mtime
        if not end:
            state: State = "waiting"
            if facts["started"] is not None:
                state = "running" if self._is_running(name) else "interrupted"
                end = _object(folder / "end.json") if state == "interrupted" else {}  # it may have ended just now
        if end:
            code = int(end.get("code", 1))
            state = "done" if code == 0 else "stopped" if code in STOPPED else "failed"
            message = _last_error(folder / "log.txt") if state == "failed" else ""
            job = Job(**facts, state=state, code=code, ended=end.get("ended"), message=message)
            self._ended[name] = job
            return job
        return Job(**facts, state=state, stopping=(folder / STOPPING).exists())

    def _is_running(self, name: str) -> bool:
        process = self._processes.get(name)
        if process is not None:
            return process.poll() is None
        return lock.holder(self.folder / name) is not None or self._is_starting(name)

    def _is_starting(self, name: str) -> bool:
        """Return True for a process of another server that is so young that it may not hold the lock yet."""
        path = self.folder / name / STARTED
        with suppress(OSError, ValueError):
            if time.time() - path.stat().st_mtime < STARTING_SECONDS:
                return heartbeat.alive(int(path.read_text()))
        return False

    def _process(self, name: str) -> int | None:
        """Return the id of a job's process."""
        if (process := self._processes.get(name)) is not None:
            return process.pid
        match = re.match(r"process (\d+) ", lock.holder(self.folder / name) or "")
        return int(match[1]) if match else None

    def _end(self, name: str, code: int) -> None:
        atomic.write_text(self.folder / name / "end.json", json.dumps({"code": code, "ended": time.time()}))


def _last_error(log: Path) -> str:
    """Return the error that a command ended with, from its log; empty if there is none."""
    errors = [line for line in _end_of(log).splitlines() if line.startswith("bardlet: ")]
    return errors[-1].removeprefix("bardlet: ") if errors else ""


def _end_of(log: Path) -> str:
    """Return the end of a log; empty if there is no log yet."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read().decode("utf-8", "replace")
    return ""


def environment() -> dict[str, str]:
    """Return the environment of a job: that of the server without its key and its settings of threads."""
    hidden = {"BARDLET_API_KEY", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONUNBUFFERED": "1"}


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
