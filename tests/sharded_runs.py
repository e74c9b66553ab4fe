"""Small runs of every stage on several processes that share the model, for the tests of sharding."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import in_processes
from torch import Tensor

from bardlet.run import checkpoint, hf

SLICES = ["--elastic", "24", "--dropout", "0.1"]
"""Dropout that does not depend on the number of processes, for 1, 2, 3, 4 and 8 of them."""
TRAINING = ["--shard", "on", "--warmup-steps", "2", "--dtype", "fp32", "--threads", "1", "--eval-every", "0",
            "--keep-checkpoints", "1", "--keep", "last"]
EAGER = ["--compile", "off"]
STAGES = ("qwen3", "gpt2", "encdec", "sft", "dpo", "grpo")


class Runs:
    """Runs of all stages on small files in `folder`."""

    def __init__(self, folder: Path) -> None:
        """Write the files and train the model that fine-tuning starts from."""
        self.folder = folder
        self.write("text.txt", "".join(f"{n} odd? {'yes' if n % 2 else 'no'}\n" for n in range(600)))
        for name, word in (("a", "ein"), ("b", "one")):
            self.write(name, "".join(f"{word} " * (1 + n % 7) + f"{n}\n" for n in range(400)))
        self.records("chats", [{"prompt": f"{n} odd?", "answer": "yes" if n % 2 else "no"} for n in range(200)])
        self.records("pairs", [{"prompt": f"{n} odd?", "chosen": ("no", "yes")[n % 2],
                                "rejected": ("yes", "no")[n % 2]} for n in range(200)])
        self.write("scorer.py", "import json, sys\n"
                   "for line in sys.stdin: print(len(set(json.loads(line)['answer'])))\n")
        self.scorer = f"{sys.executable} {folder / 'scorer.py'}"
        base = ["--n-layer", "2", "--n-head", "2", "--n-embd", "36", "--block-size", "32", "--vocab-size", "300"]
        in_processes(1, ["train", folder / "text.txt", *base, "--tokenizer", "bpe", "--steps", "5", "--dtype", "fp32",
                         "--compile", "off", "--out", folder / "base"], folder / "base.log")  # fmt: skip

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def records(self, name: str, records: Sequence[Mapping[str, str]]) -> None:
        """Write a file of records."""
        self.write(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def argv(self, stage: str) -> list[str | Path]:
        """Return the command line of a stage; 36 channels and 97 inner ones divide unevenly."""
        shape = ["--n-layer", "3", "--n-head", "2", "--n-embd", "36", "--n-inner", "97"]
        base, batch = self.folder / "base", ["--batch-size", "24"]
        return {
            "qwen3": ["train", self.folder / "text.txt", *shape, *batch, "--block-size", "16"],
            "gpt2": ["train", self.folder / "text.txt", "--model", "gpt2", *shape, *batch, "--block-size", "16"],
            "encdec": ["train", "--source", self.folder / "a", "--target", self.folder / "b", *shape,
                       "--batch-tokens", "480", "--vocab-size", "300"],
            "sft": ["sft", base, self.folder / "chats.jsonl", *batch],
            "dpo": ["dpo", base, self.folder / "pairs.jsonl", *batch],
            "grpo": ["grpo", base, self.folder / "chats.jsonl", *batch, "--reward", self.scorer, "--answer-tokens", "6",
                     "--rollout", "48", "--group", "4"],
        }[stage]

    def train(self, processes: int, argv: Sequence[str | Path], double: bool = True,
              environment: Mapping[str, str] | None = None) -> Path:
        """Return the folder of a command's run on a number of processes."""
        run = self.folder / f"run-{len(list(self.folder.glob('run-*.log')))}"
        in_processes(processes, [*argv, "--out", run], run.with_suffix(".log"), environment=environment, double=double)
        return run


COUNTED = range(4, 8)
"""The steps whose messages `count_messages` counts."""


def count_messages() -> None:
    """Print, as JSON, how often this process calls each operation of torch.distributed in the steps COUNTED.

    From the beginning of the first of them to the beginning of the step after the last one.
    """
    import torch

    from bardlet.training import trainer

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    advance, done = trainer._advance, 0

    def counting(*args: Any) -> dict[str, Any]:
        nonlocal done
        if done == COUNTED.start:
            profiler.start()
        if done == COUNTED.stop:
            profiler.stop()
            calls = {each.key.removeprefix("c10d::"): each.count for each in profiler.key_averages()
                     if each.key.startswith("c10d::")}
            print(json.dumps(calls), flush=True)
        done += 1
        return advance(*args)

    trainer._advance = counting


def difference(first: Path, second: Path, tolerance: float) -> dict[str, float]:
    """Return the largest difference of each weight and optimizer state of two runs that is above a tolerance."""
    above = {}
    for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
        assert one.keys() == other.keys()
        for name, x in one.items():
            assert x.shape == other[name].shape and x.dtype == other[name].dtype, name
            if not (worst := (x.double() - other[name].double()).abs().max().item()) <= tolerance:
                above[name] = worst
    return above


def tensors_of(run: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return the weights at the root of a run, and the optimizer states in its last checkpoint."""
    folder = checkpoint.newest_intact(run)
    saved = checkpoint.shares_in(folder) or hf.read_tensors(folder / "trainer.safetensors")
    return (hf.read_tensors(run / "model.safetensors"),
            {name: x for name, x in saved.items() if name.startswith("optimizer/")})
