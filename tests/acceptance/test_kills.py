"""SIGKILL at 200 random times and at each system call of a save: no checkpoint is lost, and the bits stay the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from invariants.test_kills import kill, whole  # noqa: F401 (a fixture)

from bardlet.errors import BardletError
from bardlet.run import checkpoint, hf
from bardlet.run import folder as run_folder
from bardlet.runtime import manifest

STRACE = shutil.which("strace")
CALLS = ("openat", "write", "fsync", "close", "rename", "unlink", "unlinkat", "rmdir", "mkdir", "ftruncate", "chmod")
"""System calls of a save, by their names in strace."""


@pytest.mark.parametrize("seed", range(100, 108))
def test_killed_at_random_times(seed: int, text: Path, tmp_path: Path,
                                whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """25 kills per seed, 200 in all."""
    kill(25, seed, text, tmp_path, whole)


def save(run: Path, step: int) -> None:
    """Save as a run does: the weights at the root, and a checkpoint; remove older checkpoints."""
    weights = {"w": torch.full((30, 20), float(step))}
    hf.write_weights(run, weights)
    checkpoint.save(run, step, weights, {"rng": torch.arange(step)}, {"seconds": 1.5}, keep=1)


def save_with(run: Path, fault: str, call: str, number: int) -> tuple[int, str, bool]:
    """Save step 20 in a process with `fault` injected at its `number`-th system call `call`.

    Return (exit code, message, True if the fault was injected).
    """
    log = run.with_suffix(".strace")
    go, ready = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b".")
        os.read(go[0], 1)
        try:
            save(run, 20)
        except BardletError as error:
            os.write(ready[1], str(error).encode())
            os._exit(1)
        except BaseException as error:
            os.write(ready[1], repr(error).encode())
            os._exit(2)
        os._exit(0)
    os.read(ready[0], 1)
    trace = subprocess.Popen([str(STRACE), "-f", "-p", str(child), "-e", f"trace={call}", "-e",
                              f"inject={call}:{fault}:when={number}", "-o", str(log)], stderr=subprocess.PIPE)
    assert trace.stderr
    assert b"attached" in trace.stderr.readline()
    os.write(go[1], b".")
    status = os.waitpid(child, 0)[1]
    trace.wait()
    trace.stderr.close()
    os.close(ready[1])
    message = os.read(ready[0], 10_000).decode()
    for descriptor in (*go, ready[0]):
        os.close(descriptor)
    code = os.waitstatus_to_exitcode(status)
    return code, message, code < 0 or "(INJECTED)" in log.read_text()


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
def test_fault_at_each_system_call_of_a_save(fault: str, call: str, tmp_path: Path) -> None:
    """A save replaces a file, writes a checkpoint and removes one: at all times both are intact, old or new.

    A system error gives a one-line message with path and bytes, and leaves no temporary files.
    """
    for number in range(1, 200):
        run = tmp_path / f"{number}"
        run.mkdir()
        (run / "config.json").write_text("{}")
        manifest.write_manifest(run, ["config.json"])
        save(run, 10)
        code, message, injected = save_with(run, fault, call, number)
        newest = checkpoint.newest_intact(run)
        assert newest.name in ("step-00000010", "step-00000020")
        step, (weights, state) = int(newest.name[5:]), checkpoint.load(newest)
        assert torch.equal(weights["w"], torch.full((30, 20), float(step))), "not the saved bits"
        assert torch.equal(state["rng"], torch.arange(step))
        assert manifest.damaged_files(run) is None, f"{call} {number}"
        run_folder.remove_partial(run)
        files = {path.name for folder in (run, run / "checkpoints") for path in folder.iterdir()}
        assert files <= {"config.json", "model.safetensors", "manifest.json", "checkpoints", "step-00000010",
                         "step-00000020"}, f"{call} {number}"
        assert code in (0, 1, -9), f"{call} {number}: {message}"
        if code == 1:
            assert str(run) in message and "\n" not in message, message
            space = re.search(r"[\d,]+ bytes are needed, [\d,]+ are free", message)
            assert space or fault != "error=ENOSPC" or "cannot be read" in message, message
        if not injected:
            assert code == 0 and newest.name == "step-00000020"
            assert number > 1, f"a save never calls {call}: remove it from CALLS"
            return
    raise AssertionError("the save never ended without a fault")
