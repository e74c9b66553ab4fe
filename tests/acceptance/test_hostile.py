"""Folders that mean harm: nothing in them is executed, nothing beside them is opened, and little time and memory goes.

Each is a Hugging Face folder, or a run, in which one thing was changed. `bardlet` reads it in a process of its own that
has read a good one before, so that what it takes is known; strace tells which files it opens and what it starts.
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
"""What makes a good folder bad: (folder, outside) -> anything. Outside lie good files that are none of its business."""

SCRIPT = """
import json, os, resource, sys, time
from bardlet.cli import main
def mark():
    try:
        open("/mark")
    except OSError:
        pass
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
command, good, bad = json.loads(sys.argv[1])
assert main([*command[:1], good, *command[1:]]) == 0
before, begun = most(), time.monotonic()
mark()
code = main([*command[:1], bad, *command[1:]])
mark()
print("\\n" + json.dumps([code, time.monotonic() - begun, most() - before]))
"""


class Bomb:
    """Leaves a file behind where somebody unpickles it."""

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
    """What torch.save writes: a ZIP with a pickle in it."""
    return lambda folder, outside: torch.save({"w": Bomb(bomb(folder))}, folder / name)


def code(*names: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        for name in names:
            (folder / name).write_text(CODE.format(str(bomb(folder))))

    return change


def edited(name: str, **changes: object) -> Change:
    """A JSON file with other values."""
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
    """A file of `size` bytes that takes no room on the disk."""
    def change(folder: Path, outside: Path) -> None:
        with open(folder / name, "wb") as f:
            f.write(head)
            f.truncate(size)

    return change


def index(*names: str) -> Change:
    """The weights lie in several files, says a list."""
    def change(folder: Path, outside: Path) -> None:
        listed = {f"w{i}": name.replace("OUTSIDE", str(outside)) for i, name in enumerate(names)}
        (folder / "model.safetensors").rename(folder / "part")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    return change


def header(change_it: Callable[[dict[str, Any]], object], tail: bytes | None = None) -> Change:
    """The header of the weights is another."""
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
    """What a header says of its first tensor."""
    return next(value for name, value in head.items() if name != "__metadata__")


def weights(change_it: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """All numbers of the model are others."""
    def change(folder: Path, outside: Path) -> None:
        path = folder / "model.safetensors"
        hf.write_tensors(path, {name: change_it(w) for name, w in load_file(path).items()})

    return change


def both(*changes: Change) -> Change:
    return lambda folder, outside: [change(folder, outside) for change in changes]


def grammar(**parts: object) -> Change:
    """The tokenizer has other parts."""
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
    "a pickle in the place of the weights": pickled("pytorch_model.bin", remove="model.safetensors"),
    "a pickle beside the weights": pickled("pytorch_model.bin"),
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
    "an index with a way round": index("part", "x/../../outside/model.safetensors"),
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
    "a header that is not there": written("model.safetensors", struct.pack("<Q", 1 << 30)),
    "overlapping tensors": header(lambda h: [v.update(data_offsets=first(h)["data_offsets"]) for n, v in h.items()
                                             if n != "__metadata__" and v["shape"] == first(h)["shape"]]),
    "a tensor behind the end": header(lambda h: first(h).update(data_offsets=[0, 1 << 40])),
    "a tensor before the beginning": header(lambda h: first(h).update(data_offsets=[-8, 8])),
    "a tensor back to front": header(lambda h: first(h).update(data_offsets=[64, 0])),
    "a hole between tensors": header(lambda h: first(h).update(data_offsets=[64, 128])),
    "a shape that overflows": header(lambda h: first(h).update(shape=[1 << 40, 1 << 40])),
    "a dtype that is none": header(lambda h: first(h).update(dtype="F1024")),
    "a deep header": header(lambda h: b"[" * 1_000_000),
    "a key twice": header(lambda h: b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, ' * 2 + b"}}", b""),
    "50,000 empty tensors": header(lambda h: json.dumps({f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                                                         for i in range(50_000)}).encode(), b""),
    "weights that are no numbers": weights(lambda w: w * float("nan")),
    "weights without bound": weights(lambda w: w.sign() * 3e38),
    "weights as 64 bits": weights(lambda w: w.double()),
    # config.json
    "a thousand million layers": edited("config.json", num_hidden_layers=10**9),
    "layers in floats": edited("config.json", num_hidden_layers=1e300),
    "no heads": edited("config.json", num_attention_heads=0),
    "fewer than no channels": edited("config.json", hidden_size=-32),
    "a width of 10^9": edited("config.json", hidden_size=10**9, intermediate_size=10**9),
    "a vocabulary of 10^12": edited("config.json", vocab_size=10**12),
    "a context of 10^12": edited("config.json", max_position_embeddings=10**12),
    "an epsilon of nan": edited("config.json", rms_norm_eps=float("nan")),
    "a deep config": written("config.json", '{"a":' * 200_000),
    "a config of 1 GB": sparse("config.json", 1 << 30, b"{"),
    "a config of many lists": written("config.json", '{"a": [' + "[]," * 5_000_000 + "[]]}"),
    # tokenizer.json
    "a tokenizer of 1 GB": sparse("tokenizer.json", 1 << 30, b"{"),
    "a tokenizer of 2,000,000 words": wide_vocabulary(2_000_000),
    "a tokenizer with an id of 2^31": grammar(model={"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**31}}),
    "a tokenizer without words": grammar(model={"type": "WordLevel", "unk_token": "a", "vocab": {}}),
    "a deep tokenizer": written("tokenizer.json", '{"model":' * 200_000),
    "a tokenizer that makes text grow": grammar(normalizer=GROWING),
    "a tokenizer that goes back and forth": grammar(pre_tokenizer=BACKTRACKING),
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
    "a deep run.toml": written("run.toml", "a = " + "[" * 100_000),
}
EVAL: dict[str, Change] = {name: RESUME[name] for name in ("run.toml is a link", "run.toml of 1 GB", "a deep run.toml")}
DOCTOR: dict[str, Change] = {**RESUME, **{name: SAMPLE[name] for name in (
    "the weights are a pickle", "config.json is a link", "model.safetensors is a FIFO", "a header of 1 GB",
    "a thousand million layers", "a tokenizer with an id of 2^31", "an index with a link")}}
KINDS = {"sample": SAMPLE, "resume": RESUME, "eval": EVAL, "doctor": DOCTOR}
CASES = [(command, name) for command, changes in KINDS.items() for name in changes]


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run."""
    from bardlet.cli import main

    folder = tmp_path_factory.mktemp("good") / "run"
    assert main(["train", str(text), "--out", str(folder), *TINY, "--steps", "2", "--save-every", "1"]) == 0
    return folder


def test_there_are_sixty() -> None:
    assert len(CASES) >= 60


def content(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(("command", "name"), CASES, ids=lambda x: x)
def test_a_hostile_folder(command: str, name: str, run: Path, tmp_path: Path) -> None:
    """It is read, or refused with one line; no trace of an execution, of a file elsewhere, of much time or memory."""
    folder, outside = (shutil.copytree(run, tmp_path / place) for place in ("folder", "outside"))
    if command == "sample":
        for left in ("manifest.json", "run.toml"):
            (folder / left).unlink()
    KINDS[command][name](folder, outside)
    elsewhere = content(outside)
    good = shutil.copytree(run, tmp_path / "good")
    argv = {"sample": ["--prompt", "a" * 40, "--tokens", "5"], "resume": ["--steps", "3", "--allow-change"]}
    assert "a" in tokenizer.load(run).vocab
    script = [sys.executable, "-c", SCRIPT, json.dumps([[command, *argv.get(command, [])], str(good), str(folder)])]
    log = tmp_path / "strace"
    trace = [STRACE, "-f", "-y", "--seccomp-bpf", "-e", "trace=open,openat,openat2,execve", "-o", str(log)]
    done = subprocess.run([*map(str, trace), *script], cwd=folder, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert "Traceback" not in done.stderr and "should not have happened" not in done.stderr, done.stderr[-2000:]
    code, seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    if name == "a tokenizer that goes back and forth":
        lines = lines[-1:]  # the library, in Rust, has its own way to say what happened, and one cannot stop it
    if command == "doctor":  # it tells on standard output, a line for each
        code = len(lines)
    assert code in (0, 1) and len(lines) == code, done.stderr[-2000:]
    named = (f"bardlet: {folder}", "bardlet: --prompt: ", "bardlet: the model's logits")
    assert all(line.startswith(named) for line in lines), lines
    assert not bomb(folder).exists()
    assert seconds <= SECONDS and megabytes <= MEGABYTES, f"{seconds:.1f} s, {megabytes:.0f} MB"
    before, calls, _ = re.split(r'.*"/mark".*\n', log.read_text())
    # the file that was opened in the end, whatever links led there
    opened = [re.findall(r"open\w*\([^\n]*\) = \d+<([^>]*)>", part) for part in (before, calls)]
    assert str(good / "config.json") in opened[0] and "execve(" in before, "strace tells nothing"
    assert not [path for path in opened[1] if path.startswith((str(outside), "/dev/zero"))], opened[1]
    assert "execve(" not in calls
    assert content(outside) == elsewhere
