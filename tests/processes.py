"""`bardlet` in processes of its own that can be killed.

They are forked from a server that has imported torch and bardlet and computed nothing, so that a start costs a fraction
of `python -m bardlet`. Nothing else is shared, neither the state of the test process nor its output.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "bardlet.runner", "bardlet.cli.train", "bardlet.cli.resume",
                              "matplotlib.pyplot"])  # fmt: skip


def start(words: Sequence[str | Path], log: Path | None = None, cut_after: int | None = None,
          own_clock: bool = False, environment: Mapping[str, str] | None = None) -> Any:
    """Start `bardlet WORDS`, its output in the file `log`.

    Args:
        words: the command line.
        log: where standard output and standard error go; None: nowhere.
        cut_after: the process ends without a word in the update after that many steps, with exit code 9.
        own_clock: its time passes in steps alone (`clocks.Clock`).
        environment: variables that it has besides those of this process.

    Returns:
        The `multiprocessing.Process`, started.
    """
    process = FORKS.Process(target=_main, args=([*map(str, words)], {**os.environ, **(environment or {})}, os.getcwd(),
                                                str(log or os.devnull), cut_after, own_clock))
    process.start()
    return process


def _main(words: Sequence[str], environment: Mapping[str, str], folder: str, log: str, cut_after: int | None,
          own_clock: bool) -> None:
    """The body of the new process; its exit code is that of the command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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


def in_two_processes(words: Sequence[str | Path], log: Path) -> str:
    """`bardlet WORDS` in two processes that find each other as those of torchrun do; what they have printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(words, log, environment={"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2",
                                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}) for rank in range(2)]
    for process in ranks:
        process.join()
    said = log.read_text(encoding="utf-8")
    assert [process.exitcode for process in ranks] == [0, 0], said
    return said


def power_cut(words: Sequence[str | Path], step: int = 7, own_clock: bool = False) -> None:
    """`bardlet WORDS` in a process that ends without a word in the update after `step` steps."""
    process = start(words, cut_after=step, own_clock=own_clock)
    process.join()
    assert process.exitcode == 9
