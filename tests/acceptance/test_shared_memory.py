"""Memory of processes that share a model: no more than their share, while training, saving, writing and resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import FORKS, HANGS
from torch.distributed import TCPStore

SIZE = ["--model", "qwen3", "--n-layer", "54", "--n-head", "8", "--n-embd", "512", "--block-size", "32",
        "--batch-size", "4", "--tokenizer", "byte", "--optimizer", "adamw", "--steps", "4", "--save-every", "2",
        "--eval-every", "0", "--keep", "last", "--dtype", "fp32", "--compile", "off", "--threads", "1",
        "--keep-checkpoints", "1"]  # fmt: skip
"""170 million parameters: weights and AdamW's averages take 2 GB."""
PHASES = {"steps": ("bardlet.training.trainer", "_advance"), "save": ("bardlet.training.trainer", "save"),
          "result": ("bardlet.training.checkpointing", "write_result"),
          "load": ("bardlet.training.checkpointing", "_restore_shares"),
          "preparation": ("bardlet.runner", "_fit")}  # fmt: skip


def memory(name: str) -> int:
    """Return a figure of this process's memory in bytes: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> None:
    """Let VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def rank(argv: list[str], environment: dict[str, str], out: str) -> None:
    """Run `bardlet ARGV`; write the peak of each phase beyond an idle process."""
    os.environ.update(environment)
    import importlib

    import torch
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import bardlet.stages.pretrain  # noqa: F401
    from bardlet.cli import main

    torch.set_num_threads(1)
    peaks: dict[str, int] = {}
    idle = memory("VmRSS")

    def note(phase: str) -> None:
        peaks[phase] = max(peaks.get(phase, 0), memory("VmHWM") - idle)
        forget_peak()

    def watched(phase: str, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            note("preparation" if phase == "preparation" else "between")
            result = function(*args, **options)
            note("between" if phase == "preparation" else phase)
            return result

        return run

    for phase, (module, name) in PHASES.items():
        place = importlib.import_module(module)
        setattr(place, name, watched(phase, getattr(place, name)))
    trainer = importlib.import_module("bardlet.training.trainer")
    trainer.write_result = importlib.import_module("bardlet.training.checkpointing").write_result  # type: ignore[attr-defined]
    code = main(argv)
    note("end")
    Path(out).write_text(json.dumps({"code": code, "peaks": peaks}), encoding="utf-8")


def peaks(processes: int, argv: list[str], folder: Path) -> dict[str, int]:
    """Return the largest peak of each phase over all ranks, in bytes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}",
              "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}  # fmt: skip
    outs = [folder / f"peaks-{number}" for number in range(processes)]
    ranks = [FORKS.Process(target=rank, args=(argv, {"RANK": f"{n}", "LOCAL_RANK": f"{n}", **shared}, str(out)))
             for n, out in enumerate(outs)]  # fmt: skip
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(HANGS)
    every = [json.loads(out.read_text(encoding="utf-8")) for out in outs]
    assert all(each["code"] == 0 for each in every)
    names = {name for each in every for name in each["peaks"]}
    return {name: max(each["peaks"].get(name, 0) for each in every) for name in names}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_four_processes_have_a_quarter_each(tmp_path: Path, record_property: Any) -> None:
    """At most 0.35 of what one process takes, in every phase of a run and of its continuation."""
    (tmp_path / "text.txt").write_text("".join(f"{n} odd? {'yes' if n % 2 else 'no'}\n" for n in range(600)))
    train = ["train", str(tmp_path / "text.txt"), *SIZE]
    one = peaks(1, [*train, "--out", str(tmp_path / "one")], tmp_path)
    shutil.rmtree(tmp_path / "one")
    run = tmp_path / "four"
    four = peaks(4, [*train, "--shard", "on", "--out", str(run)], tmp_path)
    again = peaks(4, ["resume", str(run), "--steps", "5", "--allow-change"], tmp_path)
    whole = max(one["steps"], one["save"])
    figures = {name: {phase: round(size / whole, 3) for phase, size in sizes.items()}
               for name, sizes in (("one", one), ("four", four), ("again", again))}  # fmt: skip
    print(json.dumps({"GB": whole / 1e9, **figures}))
    assert max(*four.values(), *again.values()) <= 0.35 * whole, figures
