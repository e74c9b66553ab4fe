"""Fuzzing of every file reader: it reads a corrupted file, or raises BardletError.

Half of the files have bytes changed, removed or inserted; the other half have another value somewhere.
tests/acceptance/test_fuzz.py reads 100,000 of them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bardlet import tokenizer
from bardlet.config.toml import read_toml
from bardlet.data import shard_file
from bardlet.errors import BardletError
from bardlet.run import checkpoint, hf, metrics
from bardlet.run import folder as run_folder
from bardlet.run import record as run_record
from bardlet.runtime import manifest

Reader = Callable[[Path], object]


def read_shards(path: Path) -> None:
    """Read sharded weights from their index."""
    path.with_name("model.safetensors").unlink(missing_ok=True)
    hf.read_weights(path.parent)


def use_tokenizer(path: Path) -> None:
    """Load a tokenizer, encode and decode."""
    loaded = tokenizer.load(path.parent)
    with suppress(BardletError):
        loaded.decode(loaded.encode("the 7 little bards").tolist())


def line_with_crc(path: Path) -> None:
    """Read a line of metrics.jsonl that has a valid checksum."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = path.with_name("metrics.jsonl")
    lines.write_text(f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n', encoding="utf-8")
    for line in metrics.read_metrics(path.parent):
        assert isinstance(line["step"], int)


READERS: dict[str, tuple[str, Reader]] = {
    "config": ("config.json", lambda path: hf.read_model_config(path.parent)),
    "weights": ("model.safetensors", hf.read_tensors),
    "index": ("model.safetensors.index.json", read_shards),
    "tokenizer": ("tokenizer.json", use_tokenizer),
    "tokenizer config": ("tokenizer_config.json", use_tokenizer),
    "manifest": ("manifest.json", lambda path: manifest.read_manifest(path.parent)),
    "run.toml": ("run.toml", read_toml),
    "metrics": ("metrics.jsonl", lambda path: metrics.read_metrics(path.parent)),
    # corruption with a matching manifest, digest or checksum, as an attacker could write it
    "line": ("line.json", line_with_crc),
    "metadata": ("trainer.json", lambda path: checkpoint.read_metadata(path.parent)),
    "record": ("record.json", lambda path: run_record.checked(manifest.read_json(path), str(path))),
    "shard": ("train.npy", shard_file.open_shard),
    "old shard": ("old.bin", lambda path: shard_file.open_shard(path.with_suffix(".npy"))),
}
"""The file of each reader, and the reader."""

UNUSUAL = [-1, 2**31, 2**63, 2**64, 10**30, 10**400, "qwen3", "../x", "\0", "\ud800", "Infinity", "a" * 999]
SCALARS = (st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=8)
           | st.sampled_from(UNUSUAL))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
BYTES = st.binary(max_size=9) | st.sampled_from([b"{", b"]" * 50, b"[" * 5000, b"\xff", b'"', b"1e999", b"-", b"\n"])


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Replace bytes in up to three places, or the whole content."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=99))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = at + draw(st.sampled_from([0, 1, 1, 2, 8, 100, len(content)]))
        content = content[:at] + draw(BYTES) + content[end:]
    return content


@st.composite
def changed_value(draw: st.DrawFn, good: Any) -> Any:
    """Replace a part of a JSON value, or remove a key."""
    if not isinstance(good, dict | list) or not good or draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    keys = sorted(good) if isinstance(good, dict) else range(len(good))
    key = draw(st.sampled_from(keys[:40]))
    copy = good.copy()
    if isinstance(copy, dict) and draw(st.integers(0, 9)) == 0:
        del copy[key]
    else:
        copy[key] = draw(changed_value(good[key]))
    return copy


def corrupted(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for corrupted contents of a file."""
    if name == "model.safetensors":  # eight bytes of length, a JSON header, the data
        end = 8 + int.from_bytes(content[:8], "little")
        header = changed_value(json.loads(content[8:end]))
        return changed_bytes(content[:end + 8]) | header.map(
            lambda h: (raw := _json(h)) and len(raw).to_bytes(8, "little") + raw + content[end:])
    if name == "run.toml":
        lines = content.decode().splitlines()
        return changed_bytes(content) | st.tuples(st.integers(0, len(lines) - 1), VALUES).map(
            lambda pair: "\n".join([*lines[:pair[0]], lines[pair[0]].partition("=")[0] + "=" + _json(pair[1]).decode(),
                                    *lines[pair[0] + 1:]]).encode())
    if name.endswith(".json"):
        return changed_bytes(content) | changed_value(json.loads(content)).map(_json)
    return changed_bytes(content)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="session")
def good(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid file of each kind."""
    from bardlet.cli import main

    folder = tmp_path_factory.mktemp("good") / "run"
    assert main(["train", str(text), "--out", str(folder), *TINY, "--steps", "2"]) == 0
    names = hf.read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "a-of-b")}))
    record = run_folder.read_run(folder)[1]
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "line.json").write_text('{"step": 2, "train_loss": 3.5, "lr": 0.01}')
    (folder / "trainer.json").write_bytes((checkpoint.newest_intact(folder) / "trainer.json").read_bytes())
    ids = tokenizer.load(folder).encode("the 7 little bards").astype("<u2")
    np.save(folder / "train.npy", ids)
    header = shard_file.HEADER_V1.pack(b"bardlet\0", 1, 2, len(ids), bytes(32))
    (folder / "old.bin").write_bytes(header + ids.tobytes())
    assert all(len(shard_file.open_shard(folder / f"{name}.npy")) == len(ids) for name in ("train", "old"))
    return folder


def feed(reader: str, good: Path, folder: Path, examples: int) -> int:
    """Have a reader read `examples` corrupted files; return the number that it refused."""
    name, read = READERS[reader]
    refused = 0
    for path in good.iterdir():
        if path.is_file() and path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())

    @settings(max_examples=examples, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(corrupted(name, (good / name).read_bytes()))
    def read_corrupted(content: bytes) -> None:
        nonlocal refused
        (folder / name).write_bytes(content)
        try:
            read(folder / name)
        except BardletError as error:
            refused += 1
            assert folder.name in str(error) and len(str(error)) < 1000, str(error)[:1500]

    read_corrupted()
    return refused


@pytest.mark.parametrize("reader", READERS)
def test_a_corrupted_file_is_read_or_refused(reader: str, good: Path, tmp_path: Path) -> None:
    """200 files for each reader; most readers refuse most of them."""
    refused = feed(reader, good, tmp_path, 200)
    assert refused > 50 or reader in ("metrics", "line", "tokenizer config"), refused
