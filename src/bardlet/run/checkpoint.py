"""Checkpoints of a run: write atomically, verify, load.

The files of a checkpoint are written to a temporary folder and flushed. A manifest with the sha256 of each file
follows, and a rename puts the folder in place: a checkpoint is complete or absent. Reading verifies the manifest and
falls back to the newest intact checkpoint. The root of the run, a Hugging Face folder, has a manifest of its own.

    config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json manifest.json
    run.toml metrics.jsonl
    checkpoints/step-00000500/  model.safetensors trainer.safetensors trainer.json manifest.json

The checkpoints of a shared model have a file of each process in place of the first two (`run/shares.py`):

    checkpoints/step-00000500/  shares-00001-of-00004.safetensors ... trainer.json manifest.json
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bardlet.errors import BardletError, quoted
from bardlet.run import hf, shares
from bardlet.run.record import checked
from bardlet.runtime import atomic, manifest

log = logging.getLogger("bardlet")

FILES = ("model.safetensors", "trainer.safetensors", "trainer.json")
"""The files of a checkpoint, besides its manifest."""

# ---------------------------------------------------------------- checkpoints


def save(run: Path, step: int, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor],
         metadata: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step`, read it back, then remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: optimizer steps completed.
        weights: the raw model's `hf_state_dict()`.
        state: optimizer state, weight average and random state as named tensors.
        metadata: everything else a resume needs, as JSON: seconds, plan, counters.
        keep: number of checkpoints to keep.

    Raises:
        BardletError: the checkpoint cannot be written; earlier checkpoints are unchanged.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    needed = sum(t.nbytes for t in (*weights.values(), *state.values())) + 100_000
    with atomic.explain_write_errors(folder, needed):
        before = steps_saved(run)
        with suppress(FileNotFoundError):  # the metrics up to this step belong to this checkpoint
            atomic.flush(run / "metrics.jsonl")
        try:
            temporary.mkdir(parents=True)
            hf.write_tensors(temporary / "model.safetensors", weights)
            hf.write_tensors(temporary / "trainer.safetensors", state)
            (temporary / "trainer.json").write_text(json.dumps({"step": step, **metadata}), encoding="utf-8")
            for name in FILES:
                atomic.flush(temporary / name)
            manifest.write_manifest(temporary, FILES, step=step, root=_root_entries(run))
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _check_and_remove_old(folder, before, keep)
    return folder


def share_names(count: int) -> list[str]:
    """Return the names of the files that `count` processes of a shared model write into a checkpoint."""
    return [f"shares-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def complete(temporary: Path, folder: Path, entries: Mapping[str, Any], keep: int) -> None:
    """Complete the checkpoint `folder` of a shared model, whose files are flushed, in the folder `temporary`.

    Args:
        entries: of the manifest, for each process's file.
        keep: number of checkpoints to keep.

    Raises:
        BardletError: the checkpoint cannot be written, or is not what was written; earlier checkpoints are unchanged.
    """
    run = folder.parents[1]
    with atomic.explain_write_errors(folder, 100_000):
        before = steps_saved(run)
        with suppress(FileNotFoundError):  # the metrics up to this step belong to this checkpoint
            atomic.flush(run / "metrics.jsonl")
        atomic.flush(temporary / "trainer.json")
        manifest.write_manifest(temporary, ["trainer.json"], entries, step=int(folder.name[5:]),
                                root=_root_entries(run))
        _put_in_place(temporary, folder)
        _check_and_remove_old(folder, before, keep)


def _root_entries(run: Path) -> dict[str, str]:
    """Return the checksums of the run's config.json and tokenizer files, as recorded, not of the files as they are now:
    damage must not be recorded as correct."""
    entries = manifest.read_manifest(run)["files"] if (run / manifest.MANIFEST).exists() else {}
    return {name: entries[name][0]["sha256"] for name in hf.TOKENIZER_AND_CONFIG if name in entries}


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a complete checkpoint."""
    if folder.exists():  # a run that fell back to an older checkpoint reaches this step again
        atomic.remove_folder(folder)
    os.replace(temporary, folder)
    atomic.sync_folder(folder.parent)


def _check_and_remove_old(folder: Path, before: list[Path], keep: int) -> None:
    """Read a new checkpoint back, then remove those of `before` that are too old, or newer than it."""
    if damage := manifest.damaged_files(folder):
        raise BardletError(f"{damage} (read back right after saving); the disk or memory of this machine may be "
                           "failing; earlier checkpoints are unchanged")
    saved_steps = sorted({*before, folder})
    # later checkpoints belong to a history the run abandoned when it fell back past a damaged one
    for old in [*saved_steps[:-keep], *(path for path in saved_steps if path.name > folder.name)]:
        if old != folder:
            atomic.remove_folder(old)


def steps_saved(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, intact or not."""
    if (run / "checkpoints").is_symlink():  # saving would write and remove another run's files
        raise BardletError(f"{run / 'checkpoints'}: is a symbolic link; replace it with the folder itself")
    return sorted((run / "checkpoints").glob("step-[0-9]*"))


def newest_intact(run: Path) -> Path:
    """Return the newest checkpoint whose files match its manifest, and warn of each newer, damaged one.

    Raises:
        BardletError: no checkpoint is intact.
    """
    damaged: list[str] = []
    for folder in reversed(steps_saved(run)):
        if (damage := find_damage(folder)) is None:
            for line in damaged:
                log.warning("%s; falling back to %s", line, folder.name)
            return folder
        damaged.append(damage)
    why = f" ({damaged[0]})" if damaged else ""
    raise BardletError(f"{run}: no intact checkpoint{why}; start over with "
                       f"`bardlet train --config {quoted(run / 'run.toml')} --out NEW`")


def newest_metadata(run: Path) -> dict[str, Any] | None:
    """Return the metadata of the newest intact checkpoint; None if there is none."""
    intact = (folder for folder in reversed(steps_saved(run)) if not find_damage(folder))
    return read_metadata(newest) if (newest := next(intact, None)) else None


def find_damage(folder: Path) -> str | None:
    """Describe the damage to a checkpoint: a changed or missing file, another step's manifest; None if intact."""
    if folder.is_symlink():
        return f"{folder}: is a symbolic link to another folder"
    if damage := manifest.damaged_files(folder):
        return damage
    known = manifest.read_manifest(folder)
    names = set(known["files"])
    complete = names in (set(FILES), {"trainer.json", *share_names(len(names) - 1)})
    if folder.name != f"step-{known.get('step')!s:0>8}" or not complete:
        return f"{folder / manifest.MANIFEST}: does not belong to {folder.name}"
    return None


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (weights, state) of a verified checkpoint, as passed to `save`."""
    return hf.read_tensors(folder / "model.safetensors"), hf.read_tensors(folder / "trainer.safetensors")


def shares_in(folder: Path) -> shares.SharedTensors | None:
    """Return the tensors of a verified checkpoint of a shared model; None for any other."""
    files = sorted(name for name in manifest.read_manifest(folder)["files"] if name.startswith("shares-"))
    return shares.SharedTensors([manifest.inside(folder, name) for name in files]) if files else None


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return trainer.json of a checkpoint. Raise BardletError if it is not the metadata of a run."""
    path = folder / "trainer.json"
    metadata = manifest.read_json(path)
    pairs = metadata.get("replans")
    valid = (isinstance(metadata.get("machine"), dict) and isinstance(metadata.get("config"), dict)
             and isinstance(metadata.get("record"), dict) and isinstance(pairs, list)
             and all(isinstance(pair, list) and [type(x) for x in pair] == [int, int] for pair in pairs)
             and {"step", "steps", "seconds", "tokens"} <= metadata.keys()
             and all(type(value) in (int, float) for name, value in metadata.items()
                     if name not in ("machine", "config", "record", "replans")))
    if not valid:
        raise BardletError(f"{path}: damaged: not the metadata of a run; use another checkpoint")
    checked(metadata["record"], str(path))
    return metadata
