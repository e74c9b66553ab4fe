"""The run folder: its path, run.toml, and the root's files checked and repaired."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from bardlet.config.model import ModelConfig
from bardlet.config.settings import Settings
from bardlet.config.toml import from_mapping, is_untouched, read_toml, to_toml
from bardlet.errors import BardletError
from bardlet.run import hf, lock
from bardlet.run.checkpoint import newest_whole, read_metadata, steps_saved
from bardlet.run.record import checked
from bardlet.runtime import atomic, manifest

log = logging.getLogger("bardlet")


def remove_partial(run: Path) -> None:
    """Remove what a killed process was writing or removing when it was killed; the caller holds the lock."""
    for left in has_partial(run):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def has_partial(run: Path) -> list[Path]:
    """What a killed process was writing or removing: folders of checkpoints, and files at the root."""
    folder = run / "checkpoints"
    halves = [] if folder.is_symlink() else folder.glob(".*.tmp")
    return [*halves, *(p for p in run.iterdir() if _left_over(p) and not p.is_dir())]


def _left_over(path: Path) -> bool:
    """Whether a file was being written when its process was killed: by this package, or by the safetensors library."""
    return path.name.startswith(".") and (path.suffix == ".tmp" or path.name.startswith(".tmp"))


def verify_root(run: Path, folder: Path) -> None:
    """BardletError when config.json or tokenizer.json are not those that the run had at the checkpoint `folder`."""
    known = manifest.read_manifest(folder).get("root")
    if not isinstance(known, dict):
        raise BardletError(f"{folder / manifest.MANIFEST}: damaged: it does not know the files of the root; take "
                           "another checkpoint")
    for name in hf.TOKENIZER_AND_CONFIG:
        if name in known and (not (run / name).is_file() or manifest.sha256(run / name) != known[name]):
            raise BardletError(f"{run / name}: missing or not the file that the run had at {folder.name}; "
                               "put back a copy of it")


def repair_root(run: Path) -> bool:
    """Whether the weights at the root are lost: then what is left of them is put aside, and the next take their place.

    A root whose manifest is damaged or missing gets a new one, for its files as they are.
    """
    weights = run / "model.safetensors"
    damage = manifest.damaged_files(run)
    lost = not weights.exists() or bool(damage and manifest.has_manifest(run) and manifest.damaged_files(run, [weights.name]))
    if damage or lost:
        log.warning("%s; %s", damage or f"{weights}: missing",
                    "the weights at the root are lost, and the next that are kept will replace them" if lost
                    else "the files beside it count as whole")
        if lost and weights.exists():
            os.replace(weights, weights.with_suffix(".damaged"))
        manifest.write_manifest(run, [name for name in (*hf.TOKENIZER_AND_CONFIG, weights.name) if (run / name).exists()])
    return lost


def new_folder(out: Path | None, name: str, held: bool = False) -> Path:
    """The path of a run folder that does not exist yet: `out`, or runs/NAME, runs/NAME-2, ... It is not made here.

    held: this process has locked it already.
    """
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
    if here == out and any(path.name not in lock.FILES and not _left_over(path) for path in out.iterdir()):
        if (out / "run.toml").exists():
            if not held and (other := lock.holder(out)):
                raise lock.in_use(out, other)
            raise BardletError(f"{out}: there is a run in it already; go on with it (`bardlet resume {out}`) "
                               "or name another --out")
        raise BardletError(f"{out}: exists and is not empty; name another --out")
    return out


def write_run(run: Path, config: Settings, record: dict[str, Any], shape: ModelConfig | None = None) -> None:
    """run.toml, atomically. shape: of the model, as of `to_toml`."""
    atomic.write_text(run / "run.toml", to_toml(config, record, shape))


def read_run(run: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings and the record of a run folder."""
    if not run.is_dir():
        raise BardletError(f"{run}: there is no such folder; a run folder is what `bardlet train` prints at its end")
    if not os.path.lexists(run / "run.toml"):
        raise BardletError(f"{run}: no run.toml in it, so it is not a run folder of bardlet; "
                           f"`bardlet train --init {run}` starts a run from a Hugging Face folder")
    path = manifest.inside(run, "run.toml")
    config, record = read_toml(path)
    return config, checked(record, str(path))


def settings(run: Path, changed: bool = False) -> tuple[Settings, dict[str, Any]]:
    """The settings and the record with which a run goes on: of its run.toml, where that is as the run wrote it.

    One that was changed, or damaged, or is gone, is replaced by what the newest whole checkpoint knows, and a notice
    says so; unless it can be read and `changed` says that it counts.
    """
    path = run / "run.toml"
    if is_untouched(path) or not run.is_dir():
        return read_run(run)
    if path.is_file() and changed:
        with suppress(BardletError):
            found = read_run(run)
            log.warning("%s: was changed since the run wrote it; going on with what it says", path)
            return found
    if not steps_saved(run):
        read_run(run)  # it may know better what is wrong
        raise BardletError(f"{path}: somebody changed it, and no checkpoint knows what it was; put it back, "
                           "or add --allow-change")
    folder = newest_whole(run)
    facts = read_metadata(folder)
    log.warning("%s: %s; going on with the settings that %s has%s", path,
                "changed or damaged" if path.exists() else "missing", folder.name,
                "" if changed or not path.exists() else " (--allow-change takes what it says)")
    config = from_mapping(facts["config"], str(folder / "trainer.json"))
    return config, {**facts["record"], "steps": facts["step"]}
