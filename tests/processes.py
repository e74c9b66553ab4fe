"""Run `bardlet` in separate processes that can be killed.

They are forked from a server that has only imported torch and bardlet, so they start in a fraction of the time of
`python -m bardlet`. They share neither the state of the test process nor its output.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
FORKS: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
if CAN_FORK:
    STAGES = [f"bardlet.stages.{name}" for name in ("pretrain", "translation", "sft", "reward_model", "dpo", "grpo")]
    FORKS.set_forkserver_preload(["torch", "torch._dynamo", "bardlet.runner", "bardlet.cli.train", *STAGES,
                                  "bardlet.cli.resume", "matplotlib.pyplot"])  # fmt: skip
HANGS = 600
"""Seconds after which a process counts as hanging: no machine is that slow."""


def start(argv: Sequence[str | Path], log: Path | None = None, cut_after: int | None = None,
          own_clock: bool = False, environment: Mapping[str, str] | None = None, double: bool = False,
          before: Callable[[], None] | None = None) -> Any:
    """Start `bardlet ARGV` with its output in the file `log`.

    Args:
        argv: the command line.
        log: file for standard output and standard error; None: discard them.
        cut_after: number of steps after which the process exits in the next update, with exit code 9.
        own_clock: run on a clock that only advances in steps and evaluations (`clocks.Clock`).
        environment: environment variables in addition to those of this process.
        double: train in float64.
        before: a function of a module to call in the process before it runs the command.

    Returns:
        The started `multiprocessing.Process`.
    """
    process = FORKS.Process(target=_main, args=([*map(str, argv)], {**os.environ, **(environment or {})}, os.getcwd(),
                                                str(log or os.devnull), cut_after, own_clock, double, before),
                            daemon=True)
    process.start()
    return process


def _main(argv: Sequence[str], environment: Mapping[str, str], folder: str, log: str, cut_after: int | None,
          own_clock: bool, double: bool, before: Callable[[], None] | None) -> None:
    """Run the command in the new process, and exit with its exit code."""
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
    if double:
        train_in_double()
    if before:
        before()
    original, done = trainer.train_step, 0

    def train_step(*args: object) -> tuple[float, float]:
        nonlocal done
        if done == cut_after:
            os._exit(9)
        done += 1
        return original(*args)  # type: ignore[arg-type]

    trainer.train_step = train_step  # type: ignore[assignment]
    raise SystemExit(main(argv))


def train_in_double() -> None:
    """Compute in float64 wherever float32 would be used, until the training has ended."""
    import pytest
    import torch

    from bardlet import runner
    from bardlet.run import hf

    patch, fit, read_folder = pytest.MonkeyPatch(), runner.fit, hf.read_folder

    def fit_in_double(*args: Any, **options: Any) -> None:
        fit(*args, **options)
        torch.set_default_dtype(torch.float32)
        patch.undo()

    def read_in_double(*args: Any, **options: Any) -> Any:
        model, tokenizer = read_folder(*args, **options)
        return model.double(), tokenizer

    torch.set_default_dtype(torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(hf, "read_folder", read_in_double)
    patch.setattr(runner, "fit", fit_in_double)


def end_of(process: Any) -> int:
    """Wait for a process and return its exit code; kill it if it hangs (-9)."""
    process.join(HANGS)
    if process.is_alive():
        process.kill()
        process.join()
    return int(process.exitcode)


def in_two_processes(argv: Sequence[str | Path], log: Path) -> str:
    """Run `bardlet ARGV` on two ranks, set up as by torchrun; return their output."""
    return in_processes(2, argv, log)


def in_processes(number: int, argv: Sequence[str | Path], log: Path, codes: Sequence[int] = (0,),
                 environment: Mapping[str, str] | None = None, double: bool = False,
                 before: Callable[[], None] | None = None) -> str:
    """Run `bardlet ARGV` on a number of ranks, set up as by torchrun; return their output.

    Args:
        codes: the exit codes that a rank may have.
        environment, double, before: see `start`.
    """
    import torch

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": f"{number}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}",
              "TORCHELASTIC_USE_AGENT_STORE": "True", **(environment or {})}
    ranks = [start(argv, log, environment={"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", **shared}, double=double,
                   before=before)
             for rank in range(number)]
    ended = [end_of(process) for process in ranks]
    output = log.read_text(encoding="utf-8")
    assert set(ended) <= set(codes), output
    return output


def power_cut(argv: Sequence[str | Path], step: int = 7, own_clock: bool = False) -> None:
    """Run `bardlet ARGV` in a process that exits in the update after `step` steps."""
    process = start(argv, cut_after=step, own_clock=own_clock)
    assert end_of(process) == 9
