"""The run folder: what is written while a model trains, and how a run is found again.

A checkpoint is a folder that is whole or not there: its files are written into a temporary folder and flushed, the
manifest with the sha256 of each comes last, and a rename gives it its name. Reading verifies the manifest, and goes
back to the newest checkpoint that is whole.

    checkpoints/step-00000500/  model.safetensors trainer.safetensors trainer.json manifest.json
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from bardlet import hf
from bardlet.config import TrainConfig, read_toml, to_toml
from bardlet.errors import BardletError

log = logging.getLogger("bardlet")

ROOT_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- checkpoints


def save(run: Path, step: int, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor],
         facts: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: how many optimizer steps were done.
        weights: the raw model's `hf_state_dict()`.
        state: optimizer, average and random state as named tensors.
        facts: what else going on needs, as JSON: seconds, plan, counters.
        keep: how many checkpoints stay.
    """
    if (run / "metrics.jsonl").exists():  # what the lines say belongs to this checkpoint
        with open(run / "metrics.jsonl", "r+b") as f:
            os.fsync(f.fileno())
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        hf.write_tensors(temporary / "model.safetensors", weights)
        hf.write_tensors(temporary / "trainer.safetensors", state)
        hf.write_json(temporary / "trainer.json", {"step": step, **facts})
        names = ("model.safetensors", "trainer.json", "trainer.safetensors")
        files = {name: {"sha256": sha256(temporary / name), "bytes": (temporary / name).stat().st_size}
                 for name in names}
        root = {name: sha256(run / name) for name in ROOT_FILES if (run / name).exists()}
        manifest = {"version": 1, "step": step, "files": files, "root": root}
        hf.write_json(temporary / "manifest.json", {**manifest, "digest": _digest(manifest)})
        if folder.exists():  # a run that went back to an older checkpoint comes by here again
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    hf.sync_folder(folder.parent)
    saved_steps = steps_saved(run)
    # later ones are of a history that this run has left, going back from a damaged checkpoint
    for old in [*saved_steps[:-keep], *(path for path in saved_steps if path.name > folder.name)]:
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def sweep(run: Path) -> None:
    """Remove what a killed process was writing when it was killed; the caller holds the lock."""
    for left in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for left in run.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def steps_saved(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; whole or not."""
    return sorted((run / "checkpoints").glob("step-[0-9]*"))


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None when it is whole."""
    try:
        manifest = hf.read_json(folder / "manifest.json")
    except BardletError as error:
        return str(error)
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest):
        return f"{folder / 'manifest.json'}: damaged: it does not match its own digest"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.exists():
            return f"{path}: missing"
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            return f"{path}: damaged: it is not the file that was saved"
    return None


def newest_whole(run: Path) -> Path:
    """The newest checkpoint that passes `verify`; damaged ones are named on the way.

    Raises:
        BardletError: when there is none.
    """
    damaged: list[str] = []
    for folder in reversed(steps_saved(run)):
        wrong = verify(folder)
        if wrong is None:
            for line in damaged:
                log.warning("%s; going back to %s", line, folder.name)
            return folder
        damaged.append(wrong)
    why = f" ({damaged[0]})" if damaged else ""
    raise BardletError(f"{run}: no whole checkpoint in it{why}, so there is nothing to go on from; start again with "
                       f"`bardlet train --config {run / 'run.toml'} --out ANOTHER`")


def verify_root(run: Path, folder: Path) -> None:
    """BardletError when config.json or tokenizer.json are not those that the run had at the checkpoint `folder`."""
    known = hf.read_json(folder / "manifest.json")["root"]
    for name in ("config.json", "tokenizer.json"):
        if not (run / name).exists() or sha256(run / name) != known.get(name):
            raise BardletError(f"{run / name}: missing or not the file that the run had at {folder.name}; "
                               "put back a copy of it")


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, state, facts) of a verified checkpoint, as they were given to `save`."""
    return (hf.read_tensors(folder / "model.safetensors"), hf.read_tensors(folder / "trainer.safetensors"),
            hf.read_json(folder / "trainer.json"))


# ---------------------------------------------------------------- the folder


def new_folder(out: Path | None, name: str) -> Path:
    """The path of a run folder that does not exist yet: `out`, or runs/NAME, runs/NAME-2, ... It is not made here."""
    if out is None:
        candidates = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
        return next(path for path in candidates if not path.exists())
    here = next(path for path in (out, *out.parents) if os.path.lexists(path) or path == path.parent)
    if here == out and not out.is_dir():
        raise BardletError(f"{out}: is there and is no folder; name another --out")
    if not here.is_dir():
        raise BardletError(f"{out}: {here} is not a folder, so nothing can be made in it; name another --out")
    if not os.access(here, os.W_OK | os.X_OK):
        raise BardletError(f"{out}: {here} may not be written to; name another --out, or change its permissions")
    if here == out and any(path.name != ".lock" for path in out.iterdir()):
        if (out / "run.toml").exists():
            raise BardletError(f"{out}: there is a run in it already; go on with it (`bardlet resume {out}`) "
                               "or name another --out")
        raise BardletError(f"{out}: exists and is not empty; name another --out")
    return out


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, or name the one that holds it. The system frees a killed one's lock."""
    path = run / ".lock"
    try:
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below: only its opening may fail here)
    except OSError as error:
        raise BardletError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    with handle:
        if not _try_lock(handle):
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise BardletError(f"{run}: in use by {holder}; wait for it, or stop it")
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        handle.flush()
        try:
            yield
        finally:
            handle.close()  # Windows removes no file that is open
            with suppress(OSError):
                path.unlink()


def _try_lock(handle: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        handle.seek(1 << 30)  # a byte far behind the text, which others may then read
        try:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_run(run: Path, config: TrainConfig, record: dict[str, Any]) -> None:
    """run.toml, atomically."""
    hf.write_atomically(run / "run.toml", lambda p: p.write_text(to_toml(config, record), encoding="utf-8"))


def read_run(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the record of a run folder."""
    if not run.is_dir():
        raise BardletError(f"{run}: there is no such folder; a run folder is what `bardlet train` prints at its end")
    if not (run / "run.toml").exists():
        raise BardletError(f"{run}: no run.toml in it, so it is not a run folder of bardlet; "
                           f"`bardlet train --init {run}` starts a run from a Hugging Face folder")
    return read_toml(run / "run.toml")


# ---------------------------------------------------------------- metrics.jsonl


def _sealed(line: dict[str, Any]) -> str:
    """`line` as JSON whose last key is the CRC-32 of the text before it."""
    text = json.dumps(line)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """One line at the end of metrics.jsonl."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(_sealed(line))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to the first whose CRC does not fit (a kill can leave half a line)."""
    path, lines = run / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        head, _, crc = text.rpartition(', "crc": "')
        if crc[:-2] != f"{zlib.crc32((head + '}').encode()):08x}":
            break
        lines.append(json.loads(head + "}"))
    return lines


def cut_metrics(run: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step` (they will be made again), and return those that stay."""
    lines = [line for line in read_metrics(run) if line["step"] <= step]
    text = "".join(_sealed(line) for line in lines)
    hf.write_atomically(run / "metrics.jsonl", lambda p: p.write_text(text, encoding="utf-8"))
    return lines
