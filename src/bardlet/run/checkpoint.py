"""Checkpoints of a run: written whole, verified, found again.

A checkpoint is a folder that is whole or not there: its files are written into a temporary folder and flushed, the
manifest with the sha256 of each comes last, and a rename gives it its name. Reading verifies the manifest, and goes
back to the newest checkpoint that is whole. The root, a Hugging Face folder, has a manifest of its own.

    config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json manifest.json
    run.toml metrics.jsonl
    checkpoints/step-00000500/  model.safetensors trainer.safetensors trainer.json manifest.json
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bardlet.errors import BardletError
from bardlet.run import hf
from bardlet.run.record import checked
from bardlet.runtime import atomic, manifest

log = logging.getLogger("bardlet")

FILES = ("model.safetensors", "trainer.safetensors", "trainer.json")
"""Of a checkpoint, beside its manifest."""

# ---------------------------------------------------------------- checkpoints


def save(run: Path, step: int, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor],
         facts: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step`, read it back, then remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: how many optimizer steps were done.
        weights: the raw model's `hf_state_dict()`.
        state: optimizer, average and random state as named tensors.
        facts: what else going on needs, as JSON: seconds, plan, counters.
        keep: how many checkpoints stay.

    Raises:
        BardletError: it cannot be written; the checkpoints before it are as they were.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    needed = sum(t.nbytes for t in (*weights.values(), *state.values())) + 100_000
    with atomic.explain_write_errors(folder, needed):
        before = steps_saved(run)
        with suppress(FileNotFoundError):  # what the lines say belongs to this checkpoint
            atomic.flush(run / "metrics.jsonl")
        try:
            temporary.mkdir(parents=True)
            hf.write_tensors(temporary / "model.safetensors", weights)
            hf.write_tensors(temporary / "trainer.safetensors", state)
            (temporary / "trainer.json").write_text(json.dumps({"step": step, **facts}), encoding="utf-8")
            for name in FILES:
                atomic.flush(temporary / name)
            known = manifest.read_manifest(run)["files"] if (run / manifest.MANIFEST).exists() else {}
            # as they were written, not as they are now: damage must not become the truth
            root = {name: known[name][0]["sha256"] for name in hf.TOKENIZER_AND_CONFIG if name in known}
            manifest.write_manifest(temporary, FILES, step=step, root=root)
            if folder.exists():  # a run that went back to an older checkpoint comes by here again
                atomic.remove_folder(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        atomic.sync_folder(folder.parent)
        if damage := manifest.damaged_files(folder):
            raise BardletError(f"{damage}, just now: the disk or the memory of this machine may be failing; "
                               "the checkpoints before it are as they were")
        saved_steps = sorted({*before, folder})
        # later ones are of a history that this run has left, going back from a damaged checkpoint
        for old in [*saved_steps[:-keep], *(path for path in saved_steps if path.name > folder.name)]:
            if old != folder:
                atomic.remove_folder(old)
    return folder


def steps_saved(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; whole or not."""
    if (run / "checkpoints").is_symlink():  # what is written and removed there would be another run's
        raise BardletError(f"{run / 'checkpoints'}: is a link; put the folder itself in its place")
    return sorted((run / "checkpoints").glob("step-[0-9]*"))


def newest_whole(run: Path) -> Path:
    """The newest checkpoint whose files are those of its manifest; damaged ones are named on the way.

    Raises:
        BardletError: when there is none.
    """
    damaged: list[str] = []
    for folder in reversed(steps_saved(run)):
        if (damage := find_damage(folder)) is None:
            for line in damaged:
                log.warning("%s; going back to %s", line, folder.name)
            return folder
        damaged.append(damage)
    why = f" ({damaged[0]})" if damaged else ""
    raise BardletError(f"{run}: no whole checkpoint in it{why}, so there is nothing to go on from; start again with "
                       f"`bardlet train --config {run / 'run.toml'} --out ANOTHER`")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a damaged file, one that is missing, another step's name; None: it is whole."""
    if folder.is_symlink():
        return f"{folder}: is a link to another folder"
    if damage := manifest.damaged_files(folder):
        return damage
    known = manifest.read_manifest(folder)
    if folder.name != f"step-{known.get('step')!s:0>8}" or set(known["files"]) != set(FILES):
        return f"{folder / manifest.MANIFEST}: is not that of {folder.name}"
    return None


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, state) of a verified checkpoint, as they were given to `save`."""
    return hf.read_tensors(folder / "model.safetensors"), hf.read_tensors(folder / "trainer.safetensors")


def read_metadata(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. BardletError where it is not what `save` was given by a run."""
    path = folder / "trainer.json"
    facts = manifest.read_json(path)
    pairs = facts.get("replans")
    sound = (isinstance(facts.get("machine"), dict) and isinstance(facts.get("config"), dict)
             and isinstance(facts.get("record"), dict) and isinstance(pairs, list)
             and all(isinstance(pair, list) and [type(x) for x in pair] == [int, int] for pair in pairs)
             and {"step", "steps", "seconds", "tokens"} <= facts.keys()
             and all(type(value) in (int, float) for name, value in facts.items()
                     if name not in ("machine", "config", "record", "replans")))
    if not sound:
        raise BardletError(f"{path}: damaged: it is not what a run saves; take another checkpoint")
    checked(facts["record"], str(path))
    return facts
