"""Several "machines" on one: network namespaces with a name and a cable each, which a test can pull.

A machine has its own hostname, loopback and address; files and process ids are shared. The cables end in a switch, a
namespace of its own, so that the networks of this machine stay as they are.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from processes import HANGS

AS_ROOT = [] if sys.platform != "linux" or os.geteuid() == 0 else ["--user", "--map-root-user"]
HOLDER = ["sh", "-c", f"echo ready; exec sleep {6 * HANGS}"]
"""A process that keeps a namespace, and ends by itself if the tests are killed."""


def missing() -> str | None:
    """Return why this system cannot have such machines; None if it can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    probe = ("ip link add port type veth peer name eth0 && ip link add switch type bridge && "
             "ip link set port master switch && hostname north")
    try:
        done = subprocess.run(["unshare", *AS_ROOT, "--net", "--uts", "--mount", "sh", "-c", probe],
                              capture_output=True, text=True)
    except OSError as error:
        return f"no network namespaces: {error}"
    return f"no network namespaces: {done.stderr.strip()}" if done.returncode else None


class Command:
    """A command that writes its output to a file."""

    def __init__(self, argv: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                            env={**os.environ, **(environment or {})}, start_new_session=True)

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        """Return True until the command has ended."""
        return self.process.poll() is None

    def ends(self, code: int | None = None) -> str:
        """Wait for the end and return the output; fail if it hangs, or ends with another exit code than `code`."""
        try:
            self.process.wait(HANGS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {HANGS} s: {self.output()}") from None
        assert code in (None, self.process.returncode), self.output()
        return self.output()


class Machine:
    """A network namespace with a hostname."""

    def __init__(self, name: str, prefix: Sequence[str]) -> None:
        self.name = name
        self.holder = hold([*prefix, "unshare", "--net", "--uts", "--mount"])
        self._network = os.readlink(f"/proc/{self.holder.pid}/ns/net")

    def start(self, argv: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> Command:
        """Start a command on this machine."""
        return Command([*enter(self.holder), *argv], log, environment)

    def call(self, *argv: str) -> None:
        """Run a command on this machine to its end."""
        call(self.holder, *argv)

    def processes(self) -> list[int]:
        """Return the ids of all processes on this machine."""
        pids = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and os.readlink(folder / "ns" / "net") == self._network:
                    pids.append(int(folder.name))
        return [pid for pid in pids if pid != self.holder.pid]

    def workers(self) -> dict[int, int]:
        """Return the ids of the processes that train, by rank."""
        return {rank: pid for pid in self.processes() if (rank := rank_of(pid)) is not None}

    def kill(self) -> None:
        """Kill all processes on this machine."""
        kill_all(self.processes)


class Network:
    """Machines named `names`, each with its cable."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.machines: list[Machine] = []
        self.switch = hold(["unshare", *AS_ROOT, "--net", "--uts", "--mount"])
        try:
            self._connect(folder / "hosts", names)
        except BaseException:
            self.close()
            raise

    def _connect(self, hosts: Path, names: Sequence[str]) -> None:
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address(i)} {name}\n" for i, name in enumerate(names)))
        call(self.switch, "ip", "link", "add", "switch", "type", "bridge")
        call(self.switch, "ip", "link", "set", "switch", "up")
        for i, name in enumerate(names):
            machine = Machine(name, enter(self.switch))
            self.machines.append(machine)
            call(self.switch, "ip", "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns",
                 str(machine.holder.pid))
            call(self.switch, "ip", "link", "set", f"port{i}", "master", "switch", "up")
            machine.call("hostname", name)
            machine.call("mount", "--bind", str(hosts), "/etc/hosts")
            machine.call("ip", "link", "set", "lo", "up")
            machine.call("ip", "address", "add", f"{address(i)}/24", "dev", "eth0")
            machine.call("ip", "link", "set", "eth0", "up")

    def pull(self, machine: Machine) -> None:
        """Pull the cable of a machine out of the switch."""
        call(self.switch, "ip", "link", "set", f"port{self.machines.index(machine)}", "down")

    def plug(self, machine: Machine) -> None:
        """Plug the cable in again."""
        call(self.switch, "ip", "link", "set", f"port{self.machines.index(machine)}", "up")

    def close(self) -> None:
        """Kill all processes on the machines; the namespaces end with them."""
        for machine in self.machines:
            machine.kill()
        for holder in (*(machine.holder for machine in self.machines), self.switch):
            holder.kill()
            holder.wait()
            assert holder.stdout
            holder.stdout.close()


@contextmanager
def network(folder: Path, *names: str) -> Iterator[Network]:
    """Connect machines of these names, and remove them in the end."""
    connected = Network(folder, names)
    try:
        yield connected
    finally:
        connected.close()


def address(i: int) -> str:
    """Return the address of the machine of this index."""
    return f"10.77.0.{i + 1}"


def hold(argv: Sequence[str]) -> subprocess.Popen[str]:
    """Start the process that keeps the namespaces into which `argv` moves it, and wait until it is there."""
    holder = subprocess.Popen([*argv, *HOLDER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert holder.stdout and holder.stdout.readline() == "ready\n"
    return holder


def enter(holder: subprocess.Popen[str]) -> list[str]:
    """Return the beginning of a command line that runs in a holder's namespaces."""
    user = ["--user", "--preserve-credentials"] if AS_ROOT else []
    return ["nsenter", "--target", str(holder.pid), *user, "--net", "--uts", "--mount", f"--wd={os.getcwd()}"]


def call(holder: subprocess.Popen[str], *argv: str) -> None:
    """Run a command in a holder's namespaces to its end."""
    done = subprocess.run([*enter(holder), *argv], capture_output=True, text=True)
    assert not done.returncode, f"{argv}: {done.stderr}"


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment with which a process started; empty if it is gone."""
    with suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}


def rank_of(pid: int) -> int | None:
    """Return the rank of a process that torchrun started; None of another process."""
    variables = environment_of(pid)
    return int(variables["RANK"]) if "TORCHELASTIC_RUN_ID" in variables and "RANK" in variables else None


def kill_all(processes: Callable[[], list[int]]) -> None:
    """Kill processes until none is left; they may start others meanwhile."""
    until = time.monotonic() + HANGS
    while pids := processes():
        assert time.monotonic() < until, pids
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def wait_until(condition: Callable[[], object], commands: Sequence[Command]) -> None:
    """Wait until a condition is true; fail if that takes too long, with the output of these commands."""
    until = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < until, "\n\n".join(command.output() for command in commands)
        time.sleep(0.02)


def seconds_until_named(commands: Sequence[Command], patterns: Sequence[str], since: float) -> list[float]:
    """Return the seconds from `since` until each command's output matched its pattern."""
    seen: dict[int, float] = {}

    def look() -> bool:
        for i, (command, pattern) in enumerate(zip(commands, patterns, strict=True)):
            if i not in seen and re.search(pattern, command.output()):
                seen[i] = time.monotonic() - since
        return len(seen) == len(commands)

    wait_until(look, commands)
    return [seen[i] for i in range(len(commands))]
