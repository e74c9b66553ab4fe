"""The run folder: its path, run.toml, and verifying and repairing the files at its root."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bardlet.config import toml
from bardlet.config.model import ModelConfig
from bardlet.config.pretraining import TrainConfig
from bardlet.config.settings import Settings
from bardlet.config.toml import from_mapping, read_toml, to_toml
from bardlet.errors import BardletError, quoted
from bardlet.run import foreign, hf, lock
from bardlet.run.checkpoint import newest_intact, read_metadata, steps_saved
from bardlet.run.record import checked
from bardlet.runtime import atomic, manifest

log = logging.getLogger("bardlet")


def remove_partial(run: Path) -> None:
    """Remove the leftovers of a killed process; the caller holds the lock."""
    for partial in partial_files(run):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def partial_files(run: Path) -> list[Path]:
    """Return the checkpoint folders and root files that a killed process was writing or removing."""
    folder = run / "checkpoints"
    checkpoints = [] if folder.is_symlink() else folder.glob(".*.tmp")
    return [*checkpoints, *(p for p in run.iterdir() if _is_temporary(p) and not p.is_dir())]


def _is_temporary(path: Path) -> bool:
    """Return True if `path` is named like a temporary file of this package or of the safetensors library."""
    return path.name.startswith(".") and (path.suffix == ".tmp" or path.name.startswith(".tmp"))


def verify_root(run: Path, folder: Path) -> None:
    """Raise BardletError unless config.json and the tokenizer files are those the run had at the checkpoint `folder`.
    """
    root = manifest.read_manifest(folder).get("root")
    if not isinstance(root, dict):
        raise BardletError(f"{folder / manifest.MANIFEST}: damaged: it does not list the files of the run folder; use "
                           "another checkpoint")
    for name in hf.TOKENIZER_AND_CONFIG:
        if name in root and (not (run / name).is_file() or manifest.sha256(run / name) != root[name]):
            raise BardletError(f"{run / name}: missing or changed since {folder.name}; restore a copy of it")


def root_is_intact(run: Path) -> bool:
    """Return True if `repair_root` would change nothing."""
    return (run / "model.safetensors").exists() and not manifest.damaged_files(run)


def repair_root(run: Path) -> bool:
    """Return True if the weights at the root are lost; move a damaged file aside, since later weights will replace it.

    A root whose manifest is damaged or missing gets a new one for its files as they are.
    """
    weights = run / "model.safetensors"
    damage = manifest.damaged_files(run)
    lost = not weights.exists() or bool(
        damage and manifest.has_manifest(run) and manifest.damaged_files(run, [weights.name]))
    if damage or lost:
        log.warning("%s; %s", damage or f"{weights}: missing",
                    "the weights of the run folder are lost; the next ones saved will replace them" if lost
                    else "assuming the other files are intact")
        if lost and weights.exists():
            os.replace(weights, weights.with_suffix(".damaged"))
        present = [name for name in (*hf.TOKENIZER_AND_CONFIG, weights.name) if (run / name).exists()]
        manifest.write_manifest(run, present)
    return lost


def new_folder(out: Path | None, name: str, locked: bool = False) -> Path:
    """Return the path of a new run folder: `out`, or the first free of runs/NAME, runs/NAME-2, ... Create nothing.

    Args:
        out: the folder that the user asked for; it may exist if it is empty.
        name: NAME, where `out` is None.
        locked: this process already holds the lock of `out`.

    Raises:
        BardletError: `out` cannot be created, is not empty, or contains a run.
    """
    if out is None:
        first = Path("runs") / name
        others = (Path("runs") / f"{name}-{n}" for n in itertools.count(2))
        return next(path for path in itertools.chain([first], others) if not path.exists())
    existing = next(path for path in (out, *out.parents) if os.path.lexists(path) or path == path.parent)
    if existing == out and not out.is_dir():
        raise BardletError(f"{out}: exists and is not a folder; choose another --out")
    if not existing.is_dir():
        raise BardletError(f"{out}: {existing} is not a folder; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BardletError(f"{out}: {existing} is not writable; choose another --out, or change its permissions")
    if existing == out and any(path.name not in lock.FILES and not _is_temporary(path) for path in out.iterdir()):
        if (out / "run.toml").exists():
            if not locked and (holder := lock.holder(out)):
                raise lock.in_use(out, holder)
            raise BardletError(f"{out}: already contains a run; continue it (`bardlet resume {quoted(out)}`) "
                               "or choose another --out")
        raise BardletError(f"{out}: exists and is not empty; choose another --out")
    return out


def write_run(run: Path, config: Settings, record: dict[str, Any], shape: ModelConfig | None = None) -> None:
    """Write run.toml atomically; `shape` is the model's, as in `to_toml`."""
    atomic.write_text(run / "run.toml", to_toml(config, record, shape))


def read_run(run: Path) -> tuple[Settings, dict[str, Any]]:
    """Return (settings, record) from the run.toml of a run folder."""
    foreign.check_folder(run)
    if not os.path.lexists(run / "run.toml"):
        raise BardletError(f"{run}: no run.toml, so this is not a run folder; to train a Hugging Face model, "
                           f"use `bardlet train --init {quoted(run)}`")
    path = manifest.inside(run, "run.toml")
    config, record = read_toml(path)
    return config, checked(record, str(path))


def is_untouched(run: Path) -> bool:
    """Return True if the run.toml of a folder is as a run wrote it; in the Hub's cache it is a link to a blob."""
    path = run / "run.toml"
    if path.is_symlink():
        with suppress(BardletError):
            path = Path(os.path.realpath(manifest.inside(run, path.name)))
    return toml.is_untouched(path)


def prompt_facts(config: Settings, record: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return how the texts of a run begin: `documents`, the number in its training text, and `starts_documents`.

    Where documents are shorter than the context on average, nearly all windows of the training text began one, and a
    prompt does, too.
    """
    documents = record.get("documents") or 2
    short = int(record.get("tokens") or 0) < documents * context
    return {"documents": documents, "starts_documents": isinstance(config, TrainConfig) and documents > 1 and short}


def settings(run: Path, use_edited: bool = False) -> tuple[Settings, dict[str, Any]]:
    """Return the (settings, record) with which a run continues.

    They come from run.toml if it is as the run wrote it. If it is edited, damaged or missing, they come from the newest
    intact checkpoint, with a warning; with `use_edited`, an edited run.toml that can be read is used instead.
    """
    path = run / "run.toml"
    if is_untouched(run) or not run.is_dir():
        return read_run(run)
    if path.is_file() and use_edited:
        with suppress(BardletError):
            edited = read_run(run)
            log.warning("%s: edited since the run wrote it; using the edited settings", path)
            return edited
    if not steps_saved(run):
        read_run(run)  # its own error is more specific
        raise BardletError(f"{path}: edited, and no checkpoint has the original settings; restore it, "
                           "or add --allow-change")
    folder = newest_intact(run)
    metadata = read_metadata(folder)
    log.warning("%s: %s; using the settings saved in %s%s", path,
                "edited or damaged" if path.exists() else "missing", folder.name,
                "" if use_edited or not path.exists() else " (--allow-change uses the edited ones)")
    config = from_mapping(metadata["config"], str(folder / "trainer.json"))
    return config, {**metadata["record"], "steps": metadata["step"]}
