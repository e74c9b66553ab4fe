"""Run the same training cells with two versions of bardlet and compare the results bit for bit.

    python tools/same_bits.py OLD NEW                       # commits, or folders that contain src/bardlet
    python tools/same_bits.py HEAD . --cells gpt2 dpo       # some cells, against the working tree
    python tools/same_bits.py OLD NEW --handover            # NEW resumes, samples from and evaluates the runs of OLD
    python tools/same_bits.py --list                        # list the cells

Floating-point addition is not associative: a refactoring that reorders one operation shows in the last bit, and a few
steps later everywhere. Each cell trains 40 steps with both versions on this machine, in fresh processes, with a
checkpoint every seven steps. Two copies of the run then lose their last checkpoints, one after step 21 and one after
step 35, inside the average, and are resumed. All runs must agree in

- the tensors of every checkpoint (weights, optimizer, average, random state) and the weights at the root,
- metrics.jsonl, run.toml and the `--json` output of every command, without times and paths,
- config.json and the tokenizer, and the names of the files in the run folder,
- samples or translations, and the loss on the validation text.

With `--handover` only OLD trains. NEW gets copies of its runs, checkpoints and cache, and must continue as OLD does
without rebuilding the cache. This checks that NEW can read the files of OLD. `--keep DIR` keeps all files.

There are no stored hashes. The exit code is 1 if a cell differs or fails.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, CUTS = 40, (21, 35)
EVERY = ["--steps", f"{STEPS}", "--save-every", "7", "--keep-checkpoints", "9", "--eval-every", "10",
         "--log-every", "5", "--warmup-steps", "4"]
SIZE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32"]
BATCH = ["--block-size", "32", "--batch-size", "4"]
EAGER = ["--dtype", "fp32", "--compile", "off", "--threads", "1"]
COMPILED = ["--dtype", "fp32", "--compile", "on", "--threads", "1"]
DROPOUT = ["--dropout", "0.1"]
AVERAGE = ["--keep", "average"]
BEST = ["--keep", "best"]  # the default of sft, reward and dpo until 2026-11-29, so that older versions compare

TIMES = {"seconds", "tokens_per_second", "elapsed", "prepared", "bardlet", "launch", "run", "crc"}
"""Keys that differ from one run to the next."""

SAMPLE = (["sample", "RUN", "--prompt", "the", "--tokens", "70", "--seed", "3", "--num", "2"],
         ["sample", "RUN", "--tokens", "70", "--temperature", "0"],
         ["eval", "RUN"])
"""Samples past the context window of 32 tokens, random and greedy, and the loss on the validation text."""

ROUNDED = (["sample", "RUN", "--tokens", "40", "--temperature", "0", "--dtype", "int8"],
           ["sample", "RUN", "--tokens", "40", "--temperature", "0", "--dtype", "bf16"],
           ["eval", "RUN", "--protocol", "random", "--context", "16"])

TRANSLATE = (["translate", "RUN", "new.de"], ["translate", "RUN", "new.de", "--beam", "3"], ["eval", "RUN"])


@dataclass(frozen=True)
class Cell:
    """The commands of a run. RUN in a command is the run folder; paths are relative to its parent."""

    command: list[str]
    after: tuple[list[str], ...] = SAMPLE
    """Commands whose output is compared, too."""
    before: tuple[list[str], ...] = ()
    """Commands that train the models the run starts from."""
    processes: int = 1


def text(*settings: str, mode: Sequence[str] = EAGER, after: tuple[list[str], ...] = SAMPLE,
         processes: int = 1) -> Cell:
    """Return a cell that pretrains on rhyme.txt."""
    return Cell(["train", "rhyme.txt", *settings, *BATCH, *EVERY, *mode], after, processes=processes)


def pairs(*settings: str, mode: Sequence[str] = EAGER) -> Cell:
    """Return a cell that trains a translator from a.de to a.en."""
    return Cell(["train", "--source", "a.de", "--target", "a.en", *settings, *SIZE, "--batch-tokens", "128",
                 "--block-size", "32", "--vocab-size", "300", *DROPOUT, *EVERY, *mode], TRANSLATE)  # fmt: skip


BASE = ["train", "chat.txt", *SIZE, "--block-size", "48", "--batch-size", "4", "--tokenizer", "bpe", "--vocab-size",
        "300", "--steps", "20", "--eval-every", "0", *EAGER, "--out", "base"]  # fmt: skip
CHAT = ["sft", "base", "chats.jsonl", "--steps", "20", "--eval-every", "0", *EAGER, *BEST, "--out", "chat"]
JUDGE = ["reward", "chat", "preferences.jsonl", "--steps", "10", "--eval-every", "0", *EAGER, *BEST, "--out",
         "judge"]
ANSWERS = ["--answer-tokens", "6", "--rollout", "16", "--batch-size", "8"]


def tuned(stage: str, *settings: str, before: tuple[list[str], ...] = (BASE, CHAT), start: str = "chat",
          after: tuple[list[str], ...] = SAMPLE[:2]) -> Cell:
    """Return a cell of a stage that starts from another run."""
    return Cell([stage, start, *settings, *DROPOUT, *EVERY, *EAGER], after, before)


CELLS: dict[str, Cell] = {
    "qwen3": text(*SIZE, *DROPOUT, "--optimizer", "muon", *AVERAGE),
    "qwen3-adamw": text(*SIZE, *DROPOUT, "--optimizer", "adamw", "--n-kv-head", "1", "--tokenizer", "bpe",
                        "--vocab-size", "300", after=(*SAMPLE, *ROUNDED)),
    "qwen3-compiled": text(*SIZE, *DROPOUT, *AVERAGE, mode=COMPILED),
    "qwen3-bf16": text(*SIZE, *DROPOUT, "--grad-accum", "2", mode=["--dtype", "bf16", "--compile", "off", "--threads",
                                                                 "1"]),
    "qwen3-threads": text(*SIZE, *DROPOUT, *AVERAGE, mode=["--dtype", "fp32", "--compile", "off", "--threads", "2"]),
    "gpt2": text("--model", "gpt2", *SIZE, *DROPOUT, "--optimizer", "adamw", *AVERAGE, after=(*SAMPLE, *ROUNDED)),
    "gpt2-byte": text("--model", "gpt2", *SIZE, *DROPOUT, "--tokenizer", "byte", "--no-tie-embeddings", "--grad-accum",
                      "2", "--schedule", "cosine", "--min-lr-ratio", "0.1", "--grad-clip", "0.5"),
    "gpt2-compiled": text("--model", "gpt2", *SIZE, *DROPOUT, "--optimizer", "muon", mode=COMPILED),
    "lora": Cell(["train", "chat.txt", "--init", "base", "--lora", "4", "--batch-size", "4", *DROPOUT, *EVERY, *EAGER],
                 SAMPLE, (BASE,)),
    "bigram": text("--model", "bigram", *AVERAGE),
    "one-head": text("--model", "one-head", "--n-embd", "32", *AVERAGE),
    "layer-norm": text("--model", "layer-norm", *SIZE, "--optimizer", "adamw"),
    "dropout": text("--model", "dropout", *SIZE, *DROPOUT, *AVERAGE),
    "qk-norm": text("--model", "qk-norm", *SIZE, *DROPOUT, mode=COMPILED),
    "encdec": pairs("--model", "encdec", "--optimizer", "adamw", "--label-smoothing", "0.1", *AVERAGE),
    "encdec-compiled": pairs("--model", "encdec", "--n-encoder-layer", "1", mode=COMPILED),
    "prefix-lm": pairs("--model", "gpt2", "--prefix-lm"),
    "sft": tuned("sft", "chats.jsonl", *AVERAGE, before=(BASE,), start="base"),
    "sft-lora": tuned("sft", "chats.jsonl", "--no-pack", "--lora", "4", "--batch-size", "8", *BEST, before=(BASE,),
                      start="base"),
    "reward": tuned("reward", "preferences.jsonl", "--batch-size", "4", *BEST, after=()),
    "dpo": tuned("dpo", "preferences.jsonl", "--batch-size", "4", *AVERAGE),
    "ppo": tuned("ppo", "chats.jsonl", "--reward", "judge", *ANSWERS, "--target-kl", "1", *AVERAGE,
                 before=(BASE, CHAT, JUDGE)),
    "grpo": tuned("grpo", "chats.jsonl", "--reward", "exact", *ANSWERS, "--passes", "2", "--beta", "0.1",
                  *AVERAGE),
    "two-processes": text(*SIZE, *DROPOUT, "--grad-accum", "2", *AVERAGE, processes=2),
}


def inputs(folder: Path) -> None:
    """Write the texts, pairs, conversations and preferences that the cells train on."""
    def write(name: str, *lines: str) -> None:
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    write("rhyme.txt", *(f"the {n} little bards sang {n * n % 97} songs" for n in range(240)))
    write("chat.txt", *(f"{n} odd? {'yes' if n % 2 else 'no'}" for n in range(300)))
    write("a.de", *(f"{'ein ' * (1 + n % 5)}Barde singt {n} Lieder" for n in range(300)))
    write("a.en", *(f"{'one ' * (1 + n % 5)}bard sings {n} songs" for n in range(300)))
    write("new.de", *(f"{'ein ' * (1 + n % 3)}Barde singt {n * 7} Lieder" for n in range(9)))
    write("chats.jsonl", *(json.dumps({"prompt": f"{n} odd?", "answer": "yes" if n * n % 7 % 2 else "no"})
                           for n in range(160)))  # fmt: skip
    preferences = ({"prompt": f"{n} odd?", "chosen": "yes, yes" if n % 3 else "no",
                    "rejected": "no, no" if n % 2 else "yes"} for n in range(80))  # fmt: skip
    write("preferences.jsonl", *map(json.dumps, preferences))


# ---------------------------------------------------------------- running a cell

SERVER = """
import importlib, json, os, pkgutil, sys
from pathlib import Path
import torch, torch._dynamo, torch._inductor.compile_fx, matplotlib.pyplot, sacrebleu
import bardlet
from bardlet.cli import main
from bardlet.errors import BardletError

assert Path(bardlet.__file__).is_relative_to(sys.argv[1]), bardlet.__file__
for module in pkgutil.walk_packages(bardlet.__path__, "bardlet."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except (ImportError, BardletError):  # an extra that is not installed
            pass

def run(job, rank):
    os.chdir(job["cwd"])
    os.environ.update(job["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.exit(max(map(main, job["commands"])))

for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(job["processes"]):
        if (child := os.fork()) == 0:
            run(job, rank)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(max(map(abs, codes)), flush=True)
"""
"""Forks each command from a process that has imported a version but computed nothing, so each command starts fresh."""


def instruction_limits() -> str:
    """Return a name for the instruction sets that the environment allows: code compiled for other ones crashes."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return "-".join(filter(None, map(os.environ.get, names))) or "all"


class Failed(Exception):
    """A command of a cell failed."""


class Version:
    """The source tree of a version, a folder for its runs, and a server per thread."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder = tree, folder
        self.local = threading.local()

    def _server(self) -> subprocess.Popen[str]:
        if not hasattr(self.local, "server"):
            compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}" / instruction_limits()
            environment = {**os.environ, "PYTHONPATH": str(self.tree / "src"), "OMP_NUM_THREADS": "1",
                           "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
            environment.pop("BARDLET_DATA", None)
            self.local.server = subprocess.Popen([sys.executable, "-c", SERVER, str(self.tree)], stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE, text=True, env=environment)
        return self.local.server

    def call(self, cwd: Path, *batches: Sequence[Sequence[str]], processes: int = 1) -> list[Any]:
        """Run `bardlet COMMAND --json` in the folder `cwd`; return the JSON output of each command.

        Each batch is a sequence of commands that one process runs in order.
        """
        environment = {"BARDLET_CACHE": str(cwd / "cache"), "WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1"}
        printed = []
        for batch in batches:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = {"MASTER_PORT": str(free.getsockname()[1])}
            job = {"cwd": str(cwd), "commands": [[*command, "--json"] for command in batch], "processes": processes,
                   "environment": environment | port}
            for name in ("stdout", "stderr"):
                (cwd / name).write_text("", encoding="utf-8")
            server = self._server()
            assert server.stdin and server.stdout
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            if server.stdout.readline().strip() != "0":
                messages = (cwd / "stderr").read_text(encoding="utf-8").strip().splitlines()
                raise Failed(f"bardlet {' '.join(batch[0])}: {messages[-1] if messages else 'no message'}")
            lines = (cwd / "stdout").read_text(encoding="utf-8").splitlines()
            objects = [json.loads(line) for line in lines if line.startswith("{")]
            if len(objects) != len(batch):
                raise Failed(f"bardlet {' '.join(batch[0])}: {len(batch)} commands printed {len(objects)} JSON objects")
            printed += objects
        return printed


def train(cell: Cell, version: Version, name: str) -> dict[str, str]:
    """Train the cell from its inputs in a new folder. Return digests of the run and of the output, by name."""
    cwd = version.folder / name
    shutil.rmtree(cwd, ignore_errors=True)
    cwd.mkdir(parents=True)
    inputs(cwd)
    printed = version.call(cwd, *([command] for command in cell.before))
    printed += version.call(cwd, [[*cell.command, "--out", "whole"]], processes=cell.processes)
    settings = tomllib.loads((cwd / "whole" / "run.toml").read_text(encoding="utf-8"))
    if (requested := cell.command[cell.command.index("--compile") + 1]) != settings["compile"]:
        raise Failed(f"--compile {requested} became {settings['compile']}: is a C++ compiler installed?")
    return {**digests(cwd / "whole", "whole"), **outputs("train", printed)}


def resume(cell: Cell, version: Version, name: str) -> dict[str, str]:
    """Resume the cell's run after each step of CUTS, and run the `after` commands. Return digests as `train` does."""
    cwd, printed, results = version.folder / name, [], {}
    for step in CUTS:
        cut_short(cwd / "whole", cwd / f"after-{step}", step)
        printed += version.call(cwd, [["resume", f"after-{step}"]], processes=cell.processes)
        results |= digests(cwd / f"after-{step}", f"after-{step}")
    if cell.after:
        after = [["whole" if word == "RUN" else word for word in command] for command in cell.after]
        printed += version.call(cwd, after)
    cache = sorted(path.name for path in (cwd / "cache").glob("*/*") if path.parent.name != "compiler")
    return {**results, **outputs("resume", printed), "names in the cache": digest(cache)}


def run_both(cell: Cell, old: Version, new: Version, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the results of the cell with each version."""
    first, second = ({**train(cell, version, name), **resume(cell, version, name)} for version in (old, new))
    return first, second


def handover(cell: Cell, old: Version, new: Version, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the results of each version for the run that `old` trained."""
    train(cell, old, name)
    shutil.rmtree(new.folder / name, ignore_errors=True)
    shutil.copytree(old.folder / name, new.folder / name)
    return resume(cell, old, name), resume(cell, new, name)


def cut_short(whole: Path, copy: Path, step: int) -> None:
    """Copy a run as if it had ended after `step`: without its later checkpoints."""
    shutil.copytree(whole, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


# ---------------------------------------------------------------- comparing


def digests(run: Path, name: str) -> dict[str, str]:
    """Return digests of a run folder's files, parsed as tensors, TOML or JSON lines, and of the list of files."""
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name not in (".lock", ".holder"))
    results = {f"{name} files": digest(files)}
    for path in sorted(run.rglob("*")):
        key = f"{name}/{path.relative_to(run)}"
        if path.suffix == ".safetensors":
            results |= {f"{key} {tensor}": value for tensor, value in tensors(path)}
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line[: line.rindex("}") + 1]) for line in path.read_text(encoding="utf-8").splitlines()]
            results[key] = digest(without_times(lines))
        elif path.name == "run.toml":
            results[key] = digest(without_times(tomllib.loads(path.read_text(encoding="utf-8"))))
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text(encoding="utf-8"))
            results[key] = digest([sorted(manifest), sorted(manifest["files"]), manifest.get("step")])
        elif path.name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            results[key] = digest(json.loads(path.read_text(encoding="utf-8")))
    return results


def tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, digest of dtype, shape and bytes) for each tensor of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in sorted(json.loads(raw[8:start]).items()):
        if name == "__metadata__":
            yield name, digest(entry)
        else:
            begin, end = entry["data_offsets"]
            data = hashlib.sha256(raw[start + begin : start + end]).hexdigest()
            yield name, digest([entry["dtype"], entry["shape"], data])


def without_times(value: Any) -> Any:
    """Return a JSON value without the keys that differ from run to run."""
    if isinstance(value, dict):
        return {name: without_times(x) for name, x in value.items() if name not in TIMES}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def outputs(name: str, printed: Sequence[Any]) -> dict[str, str]:
    """Return digests of the `--json` output of commands."""
    return {f"output {i} of {name}": digest(without_times(line)) for i, line in enumerate(printed)}


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return the names whose digests differ, or that are in only one of the two."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


# ---------------------------------------------------------------- the command


def tree_of(name: str, folder: Path) -> Path:
    """Unpack the source tree of a commit into `folder` and return its path; a folder with src/bardlet is used as is."""
    if (Path(name) / "src" / "bardlet").is_dir():
        return Path(name).resolve()
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", "archive", name, "src"], cwd=root, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"same_bits: {name}: neither a commit nor a folder with src/bardlet "
                         f"({done.stderr.decode().strip()})")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="a commit, or a folder with src/bardlet (default: HEAD)")
    parser.add_argument("new", nargs="?", default=".", help="the same (default: the current folder)")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL",
                        help="cells to run (default: all)")
    parser.add_argument("--handover", action="store_true", help="NEW continues the runs that OLD trained")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of cells at a time")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    parser.add_argument("--list", action="store_true", help="print the cells and exit")
    options = parser.parse_args()
    if options.list:
        for name, cell in CELLS.items():
            print(f"{name:16} {' '.join(cell.command)}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep.resolve() if options.keep else Path(temporary)
        versions = [Version(tree_of(name, Path(temporary) / f"{side}-tree"), folder / side)
                    for side, name in (("old", options.old), ("new", options.new))]

        def compare(name: str) -> tuple[str, list[str]]:
            try:
                return name, differences(*measure(CELLS[name], *versions, name))
            except Exception as error:  # a version may lack a file or a command; run the other cells
                return name, [f"failed: {error!r}"]

        measure, equal = handover if options.handover else run_both, 0
        with ThreadPoolExecutor(options.jobs) as pool:
            for name, differing in pool.map(compare, options.cells):
                equal += not differing
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                print(f"{name:16} {'equal' if not differing else '; '.join(differing[:3]) + more}", flush=True)
    print(f"equal: {equal} of {len(options.cells)}")
    return 0 if equal == len(options.cells) else 1


if __name__ == "__main__":
    sys.exit(main())
