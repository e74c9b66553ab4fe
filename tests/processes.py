"""`bardlet` in processes of its own that can be killed.

They are forked from a server that has imported torch and bardlet and computed nothing, so that a start costs a fraction
of `python -m bardlet`. Nothing else is shared, neither the state of the test process nor its output.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
FORKS: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
if CAN_FORK:
    FORKS.set_forkserver_preload(["torch", "torch._dynamo", "bardlet.runner", "bardlet.cli.train",
                                  "bardlet.cli.resume", "matplotlib.pyplot"])  # fmt: skip
HANGS = 600
"""Seconds after which a process counts as hanging: no machine is as slow."""


def start(words: Sequence[str | Path], log: Path | None = None, cut_after: int | None = None,
          own_clock: bool = False, environment: Mapping[str, str] | None = None) -> Any:
    """Start `bardlet WORDS`, its output in the file `log`.

    Args:
        words: the command line.
        log: where standard output and standard error go; None: nowhere.
        cut_after: the process is ended in the update after that many steps, with exit code 9.
        own_clock: its time passes in steps alone (`clocks.Clock`).
        environment: variables that it has besides those of this process.

    Returns:
        The `multiprocessing.Process`, started.
    """
    process = FORKS.Process(target=_main, args=([*map(str, words)], {**os.environ, **(environment or {})}, os.getcwd(),
                                                str(log or os.devnull), cut_after, own_clock), daemon=True)
    process.start()
    return process


def _main(words: Sequence[str], environment: Mapping[str, str], folder: str, log: str, cut_after: int | None,
          own_clock: bool) -> None:
    """The body of the new process; its exit code is that of the command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)

    import torch

    from bardlet.cli import main
    from bardlet.training import trainer

    torch.set_num_threads(1)
    if own_clock:
        import pytest
        from clocks import Clock, install

        install(Clock(), pytest.MonkeyPatch())
    update, done = trainer.train_step, 0

    def ending(*args: object) -> tuple[float, float]:
        nonlocal done
        if done == cut_after:
            os._exit(9)
        done += 1
        return update(*args)  # type: ignore[arg-type]

    trainer.train_step = ending  # type: ignore[assignment]
    raise SystemExit(main(words))


def end_of(process: Any) -> int:
    """Wait until a process has ended, and return its exit code. One that hangs is killed: -9."""
    process.join(HANGS)
    if process.is_alive():
        process.kill()
        process.join()
    return int(process.exitcode)


def in_two_processes(words: Sequence[str | Path], log: Path) -> str:
    """Run `bardlet WORDS` in two processes that find each other as those of torchrun do; return what they printed."""
    import torch

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}",
             "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [start(words, log, environment={"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", **known}) for rank in range(2)]
    codes = [end_of(process) for process in ranks]
    said = log.read_text(encoding="utf-8")
    assert codes == [0, 0], said
    return said


def power_cut(words: Sequence[str | Path], step: int = 7, own_clock: bool = False) -> None:
    """Run `bardlet WORDS` in a process that is ended in the update after `step` steps."""
    process = start(words, cut_after=step, own_clock=own_clock)
    assert end_of(process) == 9
