"""A Slurm cluster of this machine alone: `sbatch`, `srun`, `scontrol` and `scancel`, as far as a job script needs them.

A job's time is over when the file `over` appears in the folder FAKE_SLURM: then it gets the signal of `--signal`. With
a file `linuxproc`, `scancel` works as with that plugin of Slurm. The folder also holds the process ids of the job's
step, and the wish to be queued again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel")
KILL_SECONDS = 30
"""Seconds from SIGTERM to SIGKILL, as KillWait of slurm.conf."""


def install(folder: Path) -> dict[str, str]:
    """Write the commands to a new folder, and return the environment in which they are found."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in COMMANDS:
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def option(words: list[str], name: str, default: str = "") -> str:
    """Return the value of --NAME=VALUE; the first one counts."""
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the options at the beginning, and everything after them."""
    count = next((i for i, word in enumerate(words) if not word.startswith("--")), len(words))
    return words[:count], words[count:]


def folder() -> Path:
    """Return the folder of the cluster."""
    return Path(os.environ["FAKE_SLURM"])


def sbatch(words: list[str]) -> int:
    """Run a job to its end, also after it was queued again. The options of the command line precede the script's."""
    options, (script, *arguments) = split(words)
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    options += [word for line in lines if line.startswith("#SBATCH ") for word in line.split()[1:]]
    copy = folder() / "slurm_script"
    shutil.copy(script, copy)
    copy.chmod(0o755)
    job, nodes = str(os.getpid()), option(options, "nodes", "1")
    environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes,
                   "SLURM_JOB_NODELIST": f"node[1-{nodes}]"}
    if cpus := option(options, "cpus-per-task"):
        environment["SLURM_CPUS_PER_TASK"] = cpus
    if (gpus := option(options, "gpus-per-node")) not in ("", "0"):
        environment["SLURM_GPUS_ON_NODE"] = gpus
    restarts = 0
    while True:
        batch = subprocess.Popen([copy, *arguments], env=environment, start_new_session=True)
        (folder() / "batch").write_text(str(batch.pid))
        code = watch(batch, option(options, "signal"))
        if not (folder() / "requeue").exists():
            return code
        (folder() / "requeue").unlink()
        assert "--requeue" in options, "scontrol requeue: the job does not allow it"
        restarts += 1
        environment["SLURM_RESTART_COUNT"] = str(restarts)


def watch(batch: subprocess.Popen[bytes], warning: str) -> int:
    """Wait for the end of a batch script, and return its exit code. Send the signal of `warning` when time is over."""
    match = re.fullmatch(r"B:(\w+)@\d+", warning)
    while (code := batch.poll()) is None:
        if (folder() / "over").exists():
            (folder() / "over").unlink()
            assert match, f"--signal={warning}: this Slurm knows B:NAME@SECONDS only"
            batch.send_signal(getattr(signal, f"SIG{match[1]}"))
        time.sleep(0.05)
    return code


def srun(words: list[str]) -> int:
    """Run a command as a task on each node; return the largest exit code."""
    options, command = split(words)
    tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_NODEID": str(i),
                                            "SLURM_LOCALID": "0", "SLURMD_NODENAME": f"node{i + 1}"},
                              start_new_session=True)
             for i in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
    (folder() / "step-0").write_text(json.dumps([task.pid for task in tasks]))
    until = None
    while any(task.poll() is None for task in tasks):
        if option(options, "kill-on-bad-exit") == "1" and until is None and any(task.poll() for task in tasks):
            until = time.monotonic() + KILL_SECONDS
            send(signal.SIGTERM, [task.pid for task in tasks if task.poll() is None])
        if until and time.monotonic() > until:
            send(signal.SIGKILL, [task.pid for task in tasks if task.poll() is None])
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(words: list[str]) -> int:
    """`show hostnames LIST` prints the name of each node; `requeue JOB` ends the job and runs it again."""
    if words[:2] == ["show", "hostnames"]:
        match = re.fullmatch(r"node\[1-(\d+)\]", words[2])
        assert match, words
        os.write(1, b"localhost\n" * int(match[1]))  # at once: `head -n 1` closes the pipe
        return 0
    assert words[0] == "requeue" and len(words) == 2, words
    (folder() / "requeue").touch()
    send(signal.SIGKILL, [int((folder() / "batch").read_text())])
    return 0


def scancel(words: list[str]) -> int:
    """Send a signal to the tasks of a step, as with proctrack/cgroup; with proctrack/linuxproc, to all descendants."""
    options, (step,) = split(words)
    assert re.fullmatch(r"\d+\.0", step), f"{step}: not the first step of a job"
    pids = json.loads((folder() / "step-0").read_text())
    if (folder() / "linuxproc").exists():
        pids = descendants(pids)[::-1]  # then the launchers pass the signal on to processes that have it already
    send(getattr(signal, f"SIG{option(options, 'signal')}"), pids)
    return 0


def descendants(pids: list[int]) -> list[int]:
    """Return these processes and all that they started, directly or not."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = list(pids)
    for pid in found:  # grows on the way
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def send(number: int, pids: list[int]) -> None:
    """Send a signal to processes; some may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def processes(cluster: Path) -> list[int]:
    """Return the ids of all processes of a cluster, by their environment."""
    pids = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"FAKE_SLURM={cluster}\0".encode() in (entry / "environ").read_bytes():
                pids.append(int(entry.name))
    return pids


if __name__ == "__main__":
    print(f"{sys.argv[1]} {' '.join(sys.argv[2:])} on {socket.gethostname()}", file=sys.stderr, flush=True)
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[sys.argv[1]](sys.argv[2:]))
