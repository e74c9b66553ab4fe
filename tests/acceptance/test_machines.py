"""Two machines: a cut network, a lost machine, a killed process, and a Slurm job that is queued again.

Those that lose the other say so within 30 seconds, no process is left, and the run goes on with the same bits. The
recipes run as they are.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_slurm
import machines
import pytest
from machines import Command, Machine, Network, seconds_until_named, wait_until
from processes import in_two_processes
from runtime.test_heartbeat import SETTINGS as FEW_STEPS
from runtime.test_heartbeat import outcome, resumed_from

from bardlet.run import checkpoint, metrics
from bardlet.runtime import heartbeat

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = [*FEW_STEPS, "--steps", "600", "--keep-checkpoints", "99", "--device", "cpu"]
NAMED_SECONDS = 30
"""The seconds within which docs/guide/machines.md promises a line that names a lost process."""
TIMES = ("seconds", "tokens_per_second")
"""Fields of metrics.jsonl that depend on the time."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun's processes are looked up in /proc")
MISSING = machines.missing()
needs_network = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def bits(run: Path) -> dict[str, object]:
    """Return hashes of the weights and optimizer at the end of a run, and its metrics without times."""
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in metrics.read_metrics(run)]
    return {**outcome(run), "metrics": lines}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The bits of an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(["train", text, "--out", folder / "run", *SETTINGS], folder / "log")
    return bits(folder / "run")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Two connected machines, north and south."""
    with machines.network(tmp_path, "north", "south") as connected:
        yield connected


class Training:
    """recipes/torchrun.sh on two machines."""

    def __init__(self, network: Network, folder: Path, text: Path) -> None:
        self.network, self.folder, self.text, self.run = network, folder, text, folder / "run"
        self.starts = 0
        self.commands = {machine.name: self.start(machine) for machine in network.machines}
        self.wait_for_step(20)
        self.pids = {rank: pid for machine in network.machines for rank, pid in machine.workers().items()}
        """Of the processes that train, by rank."""

    def start(self, machine: Machine) -> Command:
        """Start the command on a machine."""
        self.starts += 1
        return machine.start(["bash", RECIPES / "torchrun.sh", "2", "north", self.text, self.run, *SETTINGS, "--json"],
                             self.folder / f"{self.starts}-{machine.name}.log",
                             {"BARDLET": sys.executable, "PROCESSES": "1", "OMP_NUM_THREADS": "1",
                              "GLOO_SOCKET_IFNAME": "eth0"})

    def wait_for_step(self, step: int) -> None:
        """Wait until this step is saved."""
        wait_for_step(self.run, step, list(self.commands.values()))

    def names(self, lost: list[Machine], since: float) -> list[float]:
        """Wait until the process on each of these machines is named on the other one; return the seconds."""
        commands, patterns = [], []
        for machine in lost:
            rank = self.network.machines.index(machine)
            commands.append(self.commands[self.network.machines[1 - rank].name])
            patterns.append(rf"bardlet: process {rank} of 2 \(pid {self.pids[rank]} on {machine.name}\).* "
                            "has been silent for")
        return seconds_until_named(commands, patterns, since)

    def is_gone(self) -> bool:
        """Return True if none of the processes that trained is left."""
        return not any(heartbeat.alive(pid) for pid in self.pids.values())

    def end(self) -> str:
        """Wait for the end on both machines, and return the output of rank 0."""
        outputs = [command.ends(0) for command in self.commands.values()]
        return next(output for output in outputs if '"resumed_from"' in output)


def wait_for_step(run: Path, step: int, commands: list[Command]) -> None:
    """Wait until a run has saved this step, or fail because a command has ended."""
    def saved() -> bool:
        assert all(command.is_running() for command in commands), "\n\n".join(each.output() for each in commands)
        return (run / "checkpoints" / f"step-{step:08}").exists()

    wait_until(saved, commands)


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint."""
    return int(checkpoint.newest_intact(run).name[5:])


@needs_network
def test_the_network_is_cut_for_a_minute(network: Network, text: Path, tmp_path: Path,
                                         whole: dict[str, object]) -> None:
    """Each machine names the other, and torchrun starts the processes again once the network is back."""
    training, south = Training(network, tmp_path, text), network.machines[1]
    network.pull(south)
    cut = time.monotonic()
    saved = newest(training.run)
    seconds = training.names(network.machines, cut)
    print(f"cut: named after {seconds[1]:.1f} s by north, {seconds[0]:.1f} s by south")
    assert max(seconds) < NAMED_SECONDS
    wait_until(training.is_gone, list(training.commands.values()))
    time.sleep(max(0.0, cut + 60 - time.monotonic()))
    network.plug(south)
    output = training.end()
    print(f"cut: trained to the end after {time.monotonic() - cut:.0f} s")
    assert training.starts == 2, "not by torchrun alone"
    assert (resumed_from(output) or 0) >= saved, "it started over"
    assert bits(training.run) == whole


@needs_network
@pytest.mark.parametrize(("lost", "power"), [("south", True), ("north", False)])
def test_a_machine_is_lost(lost: str, power: bool, network: Network, text: Path, tmp_path: Path,
                           whole: dict[str, object]) -> None:
    """The other one names it. Once it has started the same command again, the run goes on.

    All processes on it are killed; if it has lost its power, the others don't hear that their connections are closed.
    North serves torchrun's rendezvous: without it, the command also ends on south, and has to be started again.
    """
    training = Training(network, tmp_path, text)
    machine, other = network.machines if lost == "north" else network.machines[::-1]
    if not power:
        network.pull(machine)
    machine.kill()
    since = time.monotonic()
    saved = newest(training.run)
    [seconds] = training.names([machine], since)
    print(f"{lost} lost, {power=}: named after {seconds:.1f} s by {other.name}")
    assert seconds < NAMED_SECONDS
    wait_until(training.is_gone, list(training.commands.values()))
    network.plug(machine)
    training.commands[lost] = training.start(machine)
    if lost == "north":
        training.commands[other.name].ends()
        training.commands[other.name] = training.start(other)
    output = training.end()
    print(f"{lost} lost, {power=}: trained to the end after {time.monotonic() - since:.0f} s")
    assert (resumed_from(output) or 0) >= saved, "it started over"
    assert bits(training.run) == whole


class Pair:
    """Two launchers without the recipe, both on this machine."""

    def __init__(self, folder: Path, text: Path, run: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--max-restarts", "2", "--rdzv-id", "pair", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                f"localhost:{port}", "-m", "bardlet", "train", text, "--out", run, *SETTINGS, "--json"]
        self.commands = [Command(argv, folder / f"{i}.log", {"OMP_NUM_THREADS": "1"}) for i in range(2)]

    def processes(self) -> list[int]:
        """Return the ids of the launchers and of all that they started."""
        launchers = [command.process.pid for command in self.commands if command.is_running()]
        return [pid for pid in fake_slurm.descendants(launchers) if heartbeat.alive(pid)]

    def workers(self) -> dict[int, int]:
        """Return the ids of the processes that train, by rank."""
        return {rank: pid for pid in self.processes() if (rank := machines.rank_of(pid)) is not None}


def test_processes_are_killed(text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """One of each launcher: the restart counts of the two differ afterwards, and both start their process again."""
    run = tmp_path / "run"
    pair, killed = Pair(tmp_path, text, run), {}
    try:
        for rank, step in ((1, 20), (0, 200)):
            wait_for_step(run, step, pair.commands)
            killed[rank] = pair.workers()[rank]
            os.kill(killed[rank], signal.SIGKILL)
            saved = newest(run)
        outputs = [command.ends(0) for command in pair.commands]
    finally:
        machines.kill_all(pair.processes)
    for rank, pid in killed.items():
        named = rf"bardlet: process {rank} of 2 \(pid {pid} on .*\) was killed; torchrun restarts all processes"
        assert any(re.search(named, output) for output in outputs), outputs
    assert (resumed_from(next(output for output in outputs if '"resumed_from"' in output)) or 0) >= saved
    assert bits(run) == whole


def test_a_slurm_job_is_queued_again(text: Path, tmp_path: Path, whole: dict[str, object]) -> None:
    """When its time is over, it saves; queued again, it finds its run.

    Slurm's plugins differ in whom they signal: only the two launchers, or all processes, which get a second signal from
    the launchers then.
    """
    run, cluster = tmp_path / "run", tmp_path / "slurm"
    job = Command(["sbatch", "--cpus-per-task=1", "--gpus-per-node=0", RECIPES / "slurm.sh", text, run, *SETTINGS,
                   "--json"], tmp_path / "log", {**fake_slurm.install(cluster), "BARDLET": sys.executable})
    try:
        wait_for_step(run, 20, [job])
        (cluster / "over").touch()
        wait_for_step(run, 200, [job])
        (cluster / "linuxproc").touch()
        (cluster / "over").touch()
        output = job.ends(0)
    finally:
        machines.kill_all(lambda: fake_slurm.processes(cluster))
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+), and saved", output)]  # by both processes
    assert len(set(stopped)) == 2 and 20 <= min(stopped) < 200 <= max(stopped), output
    assert output.count("out of time: saving, then queueing again") == 2
    assert resumed_from(output) == max(stopped)
    assert bits(run) == whole
