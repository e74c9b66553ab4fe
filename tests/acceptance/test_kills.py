"""SIGKILL 200 times at random, and at each system call of a save: never without a checkpoint, always the same bits."""

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
"""What a save asks of the system, as strace calls it."""


@pytest.mark.parametrize("seed", range(100, 108))
def test_killed_at_random_times(seed: int, text: Path, tmp_path: Path,
                                whole: tuple[dict[str, object], float]) -> None:  # noqa: F811
    """Twenty-five kills, 200 in all."""
    kill(25, seed, text, tmp_path, whole)


def save(run: Path, step: int) -> None:
    """What a run writes when it saves: the weights at the root, a checkpoint, and all but the newest go."""
    weights = {"w": torch.full((30, 20), float(step))}
    hf.write_weights(run, weights)
    checkpoint.save(run, step, weights, {"rng": torch.arange(step)}, {"seconds": 1.5}, keep=1)


def save_with(run: Path, fault: str, call: str, number: int) -> tuple[int, str, bool]:
    """Save step 20 in a process whose `number`-th `call` meets `fault`: (exit code, what was said, whether it was met).
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
    said = os.read(ready[0], 10_000).decode()
    for end in (*go, ready[0]):
        os.close(end)
    code = os.waitstatus_to_exitcode(status)
    return code, said, code < 0 or "(INJECTED)" in log.read_text()


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
def test_a_fault_at_each_call_of_a_save(fault: str, call: str, tmp_path: Path) -> None:
    """One file replaced, one checkpoint written, one removed: at every instant both are whole, the old or the new.

    An error of the system is one line with the path and the bytes, and leaves nothing behind.
    """
    for number in range(1, 200):
        run = tmp_path / f"{number}"
        run.mkdir()
        (run / "config.json").write_text("{}")
        manifest.write_manifest(run, ["config.json"])
        save(run, 10)
        code, said, met = save_with(run, fault, call, number)
        newest = checkpoint.newest_whole(run)
        assert newest.name in ("step-00000010", "step-00000020")
        step, (weights, state) = int(newest.name[5:]), checkpoint.load(newest)
        assert torch.equal(weights["w"], torch.full((30, 20), float(step))), "bit for bit what was saved"
        assert torch.equal(state["rng"], torch.arange(step))
        assert manifest.damaged_files(run) is None, f"{call} {number}"
        run_folder.remove_partial(run)
        left = {path.name for folder in (run, run / "checkpoints") for path in folder.iterdir()}
        assert left <= {"config.json", "model.safetensors", "manifest.json", "checkpoints", "step-00000010",
                        "step-00000020"}, f"{call} {number}"
        assert code in (0, 1, -9), f"{call} {number}: {said}"
        if code == 1:
            assert str(run) in said and "\n" not in said, said
            room = re.search(r"[\d,]+ bytes are needed, [\d,]+ are free", said)
            assert room or fault != "error=ENOSPC" or "cannot be read" in said, said
        if not met:
            assert code == 0 and newest.name == "step-00000020"
            assert number > 1, f"a save makes no {call} here: take it off the list"
            return
    raise AssertionError("a save has no end")
