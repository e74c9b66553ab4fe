"""Malicious folders: bardlet executes nothing in them, opens nothing outside, and uses little time and memory.

Each is a Hugging Face folder or a run with one change. A new process reads a good folder first, as the baseline for
time and memory, and then the bad one. strace records the files that it opens and the programs that it starts.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from bardlet import tokenizer
from bardlet.run import hf
from bardlet.runtime import manifest

STRACE = shutil.which("strace")
SECONDS, MEGABYTES = 5, 200
Change = Callable[[Path, Path], object]
"""Makes a good folder bad: (folder, outside) -> anything. `outside` has good files that must not be opened."""

SCRIPT = """
import json, os, resource, sys, time
from bardlet.cli import main
def mark():
    try:
        open("/mark")
    except OSError:
        pass
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
command, good, bad = json.loads(sys.argv[1])
assert main([*command[:1], good, *command[1:]]) == 0
before, started = peak(), time.monotonic()
mark()
code = main([*command[:1], bad, *command[1:]])
mark()
print("\\n" + json.dumps([code, time.monotonic() - started, peak() - before]))
"""


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def bomb(folder: Path) -> Path:
    return folder.parent / "executed"


CODE = "import os; os.mkdir({!r})"


def pickled(name: str, remove: str | None = None) -> Change:
    def change(folder: Path, outside: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Bomb(bomb(folder))))
        if remove:
            (folder / remove).unlink()

    return change


def zipped(name: str) -> Change:
    """Return a change that writes a file with torch.save: a ZIP that contains a pickle."""
    return lambda folder, outside: torch.save({"w": Bomb(bomb(folder))}, folder / name)


def code(*names: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        for name in names:
            (folder / name).write_text(CODE.format(str(bomb(folder))))

    return change


def edited(name: str, **changes: object) -> Change:
    """Return a change that sets values in a JSON file."""
    def change(folder: Path, outside: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def written(name: str, content: str | bytes) -> Change:
    def change(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def linked(name: str, target: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target.replace("OUTSIDE", str(outside)))

    return change


def fifo(name: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def sparse(name: str, size: int, head: bytes = b"") -> Change:
    """Return a change that writes a sparse file of `size` bytes."""
    def change(folder: Path, outside: Path) -> None:
        with open(folder / name, "wb") as f:
            f.write(head)
            f.truncate(size)

    return change


def index(*names: str) -> Change:
    """Return a change that adds an index of several files with weights."""
    def change(folder: Path, outside: Path) -> None:
        listed = {f"w{i}": name.replace("OUTSIDE", str(outside)) for i, name in enumerate(names)}
        (folder / "model.safetensors").rename(folder / "part")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    return change


def header(change_it: Callable[[dict[str, Any]], object], tail: bytes | None = None) -> Change:
    """Return a change that edits or replaces the header of the weights."""
    def change(folder: Path, outside: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8:end])
        raw = change_it(head)
        raw = raw if isinstance(raw, bytes) else json.dumps(head).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + (content[end:] if tail is None else tail))

    return change


def first(head: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the first tensor in a header."""
    return next(value for name, value in head.items() if name != "__metadata__")


def weights(change_it: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Return a change that maps all weights."""
    def change(folder: Path, outside: Path) -> None:
        path = folder / "model.safetensors"
        hf.write_tensors(path, {name: change_it(w) for name, w in load_file(path).items()})

    return change


def both(*changes: Change) -> Change:
    return lambda folder, outside: [change(folder, outside) for change in changes]


def grammar(**parts: object) -> Change:
    """Return a change that sets parts of the tokenizer."""
    return edited("tokenizer.json", **parts)


def wide_vocabulary(n: int) -> Change:
    model = {"type": "WordLevel", "unk_token": "a", "vocab": {f"{i:x}": i for i in range(n)}}
    return lambda folder, outside: edited("tokenizer.json", model=model)(folder, outside)


def sealed_with(name: str) -> Change:
    return lambda folder, outside: manifest.write_manifest(folder, [name.replace("OUTSIDE", str(outside))])


EVIL_TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**12) %}{% endfor %}"
LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
GROWING = {"type": "Sequence", "normalizers": [LONGER] * 4}
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
STEP = "checkpoints/step-00000002"

SAMPLE: dict[str, Change] = {
    # code
    "the weights are a pickle": pickled("model.safetensors"),
    "the weights are a ZIP of torch.save": zipped("model.safetensors"),
    "a pickle instead of the weights": pickled("pytorch_model.bin", remove="model.safetensors"),
    "a pickle next to the weights": pickled("pytorch_model.bin"),
    "pickles of a trainer": both(pickled("training_args.bin"), pickled("optimizer.pt"), pickled("rng_state.pth")),
    "config.json is a pickle": pickled("config.json"),
    "tokenizer.json is a pickle": pickled("tokenizer.json"),
    "a vocabulary as a pickle": pickled("vocab.pkl", remove="tokenizer.json"),
    "a model's own code": both(edited("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"},
                                      trust_remote_code=True), code("evil.py", "modeling_evil.py", "__init__.py")),
    "a tokenizer's own code": both(edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]},
                                          tokenizer_class="evil.T"), code("evil.py", "tokenization_evil.py")),
    "generation's own code": both(edited("generation_config.json", custom_generate="evil.py"), code("evil.py")),
    "modules with well-known names": code("torch.py", "json.py", "bardlet.py", "tokenizers.py", "sitecustomize.py"),
    "a template with code": edited("tokenizer_config.json", chat_template=EVIL_TEMPLATE),
    "a template with code in a file": written("chat_template.jinja", EVIL_TEMPLATE),
    "YAML with an object": written("config.json", "!!python/object/apply:os.system ['true']"),
    # paths
    **{f"{name} is a link": linked(name, f"OUTSIDE/{name}")
       for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                    "generation_config.json", "manifest.json", "run.toml")},
    **{f"{name} is a FIFO": fifo(name) for name in ("config.json", "model.safetensors", "tokenizer.json",
                                                     "tokenizer_config.json", "manifest.json", "run.toml")},
    **{f"{name} is /dev/zero": linked(name, "/dev/zero") for name in ("config.json", "model.safetensors",
                                                                       "tokenizer.json")},
    "config.json is a link to itself": linked("config.json", "config.json"),
    "config.json is a folder": lambda f, o: [(f / "config.json").unlink(), (f / "config.json").mkdir()],
    "an index with ..": index("part", "../outside/model.safetensors"),
    "an index with an absolute path": index("part", "OUTSIDE/model.safetensors"),
    "an index with a detour": index("part", "x/../../outside/model.safetensors"),
    "an index with a link": both(index("part", "elsewhere"), linked("elsewhere", "OUTSIDE/model.safetensors")),
    "an index with empty names": index("", ".", ".."),
    "an index with NUL": index("part\0.safetensors"),
    "an index of 100,000 files": index(*(f"part-{i}" for i in range(100_000))),
    "a manifest with ..": sealed_with("../outside/model.safetensors"),
    "a manifest with an absolute path": sealed_with("OUTSIDE/model.safetensors"),
    # the weights
    "a header of 1 GB": sparse("model.safetensors", 2 << 30, struct.pack("<Q", 1 << 30) + b"{"),
    "a header of 2^63 bytes": written("model.safetensors", struct.pack("<Q", 1 << 63) + b"{}"),
    "a header of 90 MB": sparse("model.safetensors", 200 << 20, struct.pack("<Q", 90 << 20) + b"{}" + b" " * 99),
    "a header of 4 MB": header(lambda h: b"[" + b"{}," * 1_300_000 + b"{}]"),
    "a missing header": written("model.safetensors", struct.pack("<Q", 1 << 30)),
    "overlapping tensors": header(lambda h: [v.update(data_offsets=first(h)["data_offsets"]) for n, v in h.items()
                                             if n != "__metadata__" and v["shape"] == first(h)["shape"]]),
    "a tensor past the end": header(lambda h: first(h).update(data_offsets=[0, 1 << 40])),
    "a tensor before the start": header(lambda h: first(h).update(data_offsets=[-8, 8])),
    "a tensor that ends before it starts": header(lambda h: first(h).update(data_offsets=[64, 0])),
    "a gap between tensors": header(lambda h: first(h).update(data_offsets=[64, 128])),
    "a shape that overflows": header(lambda h: first(h).update(shape=[1 << 40, 1 << 40])),
    "an unknown dtype": header(lambda h: first(h).update(dtype="F1024")),
    "a deeply nested header": header(lambda h: b"[" * 1_000_000),
    "a key twice": header(lambda h: b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, ' * 2 + b"}}", b""),
    "50,000 empty tensors": header(lambda h: json.dumps({f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                                                         for i in range(50_000)}).encode(), b""),
    "weights of NaN": weights(lambda w: w * float("nan")),
    "huge weights": weights(lambda w: w.sign() * 3e38),
    "weights in float64": weights(lambda w: w.double()),
    # config.json
    "a billion layers": edited("config.json", num_hidden_layers=10**9),
    "a float number of layers": edited("config.json", num_hidden_layers=1e300),
    "no heads": edited("config.json", num_attention_heads=0),
    "a negative number of channels": edited("config.json", hidden_size=-32),
    "a width of 10^9": edited("config.json", hidden_size=10**9, intermediate_size=10**9),
    "a vocabulary of 10^12": edited("config.json", vocab_size=10**12),
    "a context of 10^12": edited("config.json", max_position_embeddings=10**12),
    "an epsilon of NaN": edited("config.json", rms_norm_eps=float("nan")),
    "a deeply nested config": written("config.json", '{"a":' * 200_000),
    "a config of 1 GB": sparse("config.json", 1 << 30, b"{"),
    "a config of many lists": written("config.json", '{"a": [' + "[]," * 5_000_000 + "[]]}"),
    # tokenizer.json
    "a tokenizer of 1 GB": sparse("tokenizer.json", 1 << 30, b"{"),
    "a tokenizer of 2,000,000 tokens": wide_vocabulary(2_000_000),
    "a tokenizer with an id of 2^31": grammar(model={"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**31}}),
    "a tokenizer without tokens": grammar(model={"type": "WordLevel", "unk_token": "a", "vocab": {}}),
    "a deeply nested tokenizer": written("tokenizer.json", '{"model":' * 200_000),
    "a tokenizer that makes text grow": grammar(normalizer=GROWING),
    "a tokenizer that backtracks": grammar(pre_tokenizer=BACKTRACKING),
    "a tokenizer that pads": grammar(padding={"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_id": 0,
                                              "pad_type_id": 0, "pad_token": "a", "pad_to_multiple_of": None}),
    "300,000 added tokens": grammar(added_tokens=[{"id": 30 + i, "content": f"<{i}>", "single_word": False,
                                                     "lstrip": False, "rstrip": False, "normalized": False,
                                                     "special": True} for i in range(300_000)]),
}
RESUME: dict[str, Change] = {
    "trainer.safetensors is a pickle": pickled(f"{STEP}/trainer.safetensors"),
    "a checkpoint is a link": linked(STEP, "OUTSIDE/" + STEP),
    "checkpoints/ is a link": linked("checkpoints", "OUTSIDE/checkpoints"),
    "run.toml is a link": linked("run.toml", "OUTSIDE/run.toml"),
    ".lock is a link": linked(".lock", "OUTSIDE/metrics.jsonl"),
    ".lock is a FIFO": fifo(".lock"),
    "trainer.json is a FIFO": fifo(f"{STEP}/trainer.json"),
    "run.toml of 1 GB": sparse("run.toml", 1 << 30, b"seed = 1\n"),
    "metrics.jsonl is a FIFO": fifo("metrics.jsonl"),
    "metrics.jsonl is a link": linked("metrics.jsonl", "OUTSIDE/metrics.jsonl"),
    "a deeply nested run.toml": written("run.toml", "a = " + "[" * 100_000),
}
EVAL: dict[str, Change] = {name: RESUME[name] for name in ("run.toml is a link", "run.toml of 1 GB",
                                                           "a deeply nested run.toml")}
DOCTOR: dict[str, Change] = {**RESUME, **{name: SAMPLE[name] for name in (
    "the weights are a pickle", "config.json is a link", "model.safetensors is a FIFO", "a header of 1 GB",
    "a billion layers", "a tokenizer with an id of 2^31", "an index with a link")}}
KINDS = {"sample": SAMPLE, "resume": RESUME, "eval": EVAL, "doctor": DOCTOR}
CASES = [(command, name) for command, changes in KINDS.items() for name in changes]


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run."""
    from bardlet.cli import main

    folder = tmp_path_factory.mktemp("good") / "run"
    assert main(["train", str(text), "--out", str(folder), *TINY, "--steps", "2", "--save-every", "1"]) == 0
    return folder


def test_there_are_at_least_sixty_cases() -> None:
    assert len(CASES) >= 60


def content(folder: Path) -> dict[Path, bytes]:
    """Return all files in a folder and their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(("command", "name"), CASES, ids=lambda x: x)
def test_a_hostile_folder(command: str, name: str, run: Path, tmp_path: Path) -> None:
    """It is read, or refused with one line, without running code or opening other files, in little time and memory."""
    folder, outside = (shutil.copytree(run, tmp_path / copy) for copy in ("folder", "outside"))
    if command == "sample":
        for file in ("manifest.json", "run.toml"):
            (folder / file).unlink()
    KINDS[command][name](folder, outside)
    outside_before = content(outside)
    good = shutil.copytree(run, tmp_path / "good")
    argv = {"sample": ["--prompt", "a" * 40, "--tokens", "5"], "resume": ["--steps", "3", "--allow-change"]}
    assert "a" in tokenizer.load(run).vocab
    script = [sys.executable, "-c", SCRIPT, json.dumps([[command, *argv.get(command, [])], str(good), str(folder)])]
    log = tmp_path / "strace"
    trace = [STRACE, "-f", "-y", "--seccomp-bpf", "-e", "trace=open,openat,openat2,execve", "-o", str(log)]
    done = subprocess.run([*map(str, trace), *script], cwd=folder, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr[-2000:]
    code, seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    if name == "a tokenizer that backtracks":
        lines = lines[-1:]  # tokenizers, in Rust, prints its own message, which Python cannot suppress
    if command == "doctor":  # it prints to standard output, a line per problem
        code = len(lines)
    assert code in (0, 1) and len(lines) == code, done.stderr[-2000:]
    named = (f"bardlet: {folder}", "bardlet: --prompt: ", "bardlet: the model's logits")
    assert all(line.startswith(named) for line in lines), lines
    assert not bomb(folder).exists()
    assert seconds <= SECONDS and megabytes <= MEGABYTES, f"{seconds:.1f} s, {megabytes:.0f} MB"
    before, calls, _ = re.split(r'.*"/mark".*\n', log.read_text())
    # the files that were opened, with links resolved
    opened = [re.findall(r"open\w*\([^\n]*\) = \d+<([^>]*)>", part) for part in (before, calls)]
    assert str(good / "config.json") in opened[0] and "execve(" in before, "strace recorded nothing"
    assert not [path for path in opened[1] if path.startswith((str(outside), "/dev/zero"))], opened[1]
    assert "execve(" not in calls
    assert content(outside) == outside_before
