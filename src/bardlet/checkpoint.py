"""The run folder: what is written while a model trains, and how a run is found again.

A checkpoint is a folder that is whole or not there: its files are written into a temporary folder and flushed, the
manifest with the sha256 of each comes last, and a rename gives it its name. Reading verifies the manifest, and goes
back to the newest checkpoint that is whole. The root, a Hugging Face folder, has a manifest of its own.

    config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json manifest.json
    run.toml metrics.jsonl
    checkpoints/step-00000500/  model.safetensors trainer.safetensors trainer.json manifest.json
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bardlet import files, hf, lock
from bardlet.config import TrainConfig
from bardlet.errors import BardletError, shown
from bardlet.toml import from_mapping, read_toml, sealed, to_toml

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
    with files.writing(folder, needed):
        before = steps_saved(run)
        with suppress(FileNotFoundError):  # what the lines say belongs to this checkpoint
            files.flush(run / "metrics.jsonl")
        try:
            temporary.mkdir(parents=True)
            hf.write_tensors(temporary / "model.safetensors", weights)
            hf.write_tensors(temporary / "trainer.safetensors", state)
            (temporary / "trainer.json").write_text(json.dumps({"step": step, **facts}), encoding="utf-8")
            for name in FILES:
                files.flush(temporary / name)
            known = files.read_manifest(run)["files"] if (run / files.MANIFEST).exists() else {}
            # as they were written, not as they are now: damage must not become the truth
            root = {name: known[name][0]["sha256"] for name in hf.WORDS_AND_SHAPE if name in known}
            files.seal(temporary, FILES, step=step, root=root)
            if folder.exists():  # a run that went back to an older checkpoint comes by here again
                files.remove_folder(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        files.sync_folder(folder.parent)
        if damage := files.wrong(folder):
            raise BardletError(f"{damage}, just now: the disk or the memory of this machine may be failing; "
                               "the checkpoints before it are as they were")
        saved_steps = sorted({*before, folder})
        # later ones are of a history that this run has left, going back from a damaged checkpoint
        for old in [*saved_steps[:-keep], *(path for path in saved_steps if path.name > folder.name)]:
            if old != folder:
                files.remove_folder(old)
    return folder


def sweep(run: Path) -> None:
    """Remove what a killed process was writing or removing when it was killed; the caller holds the lock."""
    for left in left_over(run):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def left_over(run: Path) -> list[Path]:
    """What a killed process was writing or removing: folders of checkpoints, and files at the root."""
    folder = run / "checkpoints"
    halves = [] if folder.is_symlink() else folder.glob(".*.tmp")
    return [*halves, *(p for p in run.iterdir() if _left_over(p) and not p.is_dir())]


def _left_over(path: Path) -> bool:
    """Whether a file was being written when its process was killed: by this package, or by the safetensors library."""
    return path.name.startswith(".") and (path.suffix == ".tmp" or path.name.startswith(".tmp"))


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
        if (damage := wrong(folder)) is None:
            for line in damaged:
                log.warning("%s; going back to %s", line, folder.name)
            return folder
        damaged.append(damage)
    why = f" ({damaged[0]})" if damaged else ""
    raise BardletError(f"{run}: no whole checkpoint in it{why}, so there is nothing to go on from; start again with "
                       f"`bardlet train --config {run / 'run.toml'} --out ANOTHER`")


def wrong(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a damaged file, one that is missing, another step's name; None: it is whole."""
    if folder.is_symlink():
        return f"{folder}: is a link to another folder"
    if damage := files.wrong(folder):
        return damage
    manifest = files.read_manifest(folder)
    if folder.name != f"step-{manifest.get('step')!s:0>8}" or set(manifest["files"]) != set(FILES):
        return f"{folder / files.MANIFEST}: is not that of {folder.name}"
    return None


def verify_root(run: Path, folder: Path) -> None:
    """BardletError when config.json or tokenizer.json are not those that the run had at the checkpoint `folder`."""
    known = files.read_manifest(folder).get("root")
    if not isinstance(known, dict):
        raise BardletError(f"{folder / files.MANIFEST}: damaged: it does not know the files of the root; take another "
                           "checkpoint")
    for name in hf.WORDS_AND_SHAPE:
        if name in known and (not (run / name).is_file() or files.sha256(run / name) != known[name]):
            raise BardletError(f"{run / name}: missing or not the file that the run had at {folder.name}; "
                               "put back a copy of it")


def mend_root(run: Path) -> bool:
    """Whether the weights at the root are lost: then what is left of them is put aside, and the next take their place.

    A root whose manifest is damaged or missing gets a new one, for its files as they are.
    """
    weights = run / "model.safetensors"
    damage = files.wrong(run)
    lost = not weights.exists() or bool(damage and files.has_manifest(run) and files.wrong(run, [weights.name]))
    if damage or lost:
        log.warning("%s; %s", damage or f"{weights}: missing",
                    "the weights at the root are lost, and the next that are kept will replace them" if lost
                    else "the files beside it count as whole")
        if lost and weights.exists():
            os.replace(weights, weights.with_suffix(".damaged"))
        files.seal(run, [name for name in (*hf.WORDS_AND_SHAPE, weights.name) if (run / name).exists()])
    return lost


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, state) of a verified checkpoint, as they were given to `save`."""
    return hf.read_tensors(folder / "model.safetensors"), hf.read_tensors(folder / "trainer.safetensors")


# ---------------------------------------------------------------- the folder


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
    if here == out and any(path.name != ".lock" and not _left_over(path) for path in out.iterdir()):
        if (out / "run.toml").exists():
            if not held and (other := lock.holder(out)):
                raise lock.in_use(out, other)
            raise BardletError(f"{out}: there is a run in it already; go on with it (`bardlet resume {out}`) "
                               "or name another --out")
        raise BardletError(f"{out}: exists and is not empty; name another --out")
    return out


def write_run(run: Path, config: TrainConfig, record: dict[str, Any]) -> None:
    """run.toml, atomically."""
    files.write_text(run / "run.toml", to_toml(config, record))


def read_run(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the record of a run folder."""
    if not run.is_dir():
        raise BardletError(f"{run}: there is no such folder; a run folder is what `bardlet train` prints at its end")
    if not os.path.lexists(run / "run.toml"):
        raise BardletError(f"{run}: no run.toml in it, so it is not a run folder of bardlet; "
                           f"`bardlet train --init {run}` starts a run from a Hugging Face folder")
    path = files.inside(run, "run.toml")
    config, record = read_toml(path)
    return config, checked(record, str(path))


RECORD = {"text": str, "text_hash": str, "tokenizer": str, "documents": int, "tokens": int, "minutes": float,
          "most_steps": int, "parameters": int, "trainable": int, "val_tokens": int, "val_tokens_of": int,
          "steps": int, "saved": int, "seconds": float, "tokens_per_second": float, "val_loss": float,
          "train_loss": float, "selected_by": str, "selected_step": int, "averaged": int, "machine": dict,
          "finished": bool, "expected": float, "bigram": float, "characters_per_token": float, "duplicated": float,
          "leaked": float, "launch": str, "reasons": list, "evaluation_rows": int, "rung": str, "counting": list,
          "bits_per_byte": float, "nats_per_char": float, "characters": float, "guessing": float, "batches": int,
          "bleu": float, "chrf": float, "bleu_signature": str, "val_loss_before": float, "cut": int, "left_out": int,
          "ended": float, "unanswered": int, "base_hash": str, "accuracy": float, "margin": float, "longer": float,
          "accuracy_longer": float, "accuracy_shorter": float, "likes_length": float, "calibration_error": float,
          "reward_mean": float, "reward_deviation": float, "reward_hash": str, "reward_before": float,
          "reward_after": float, "sampled_before": float, "sampled_after": float, "kl": float, "answer_length": float,
          "different_before": float, "different": float, "distinct_before": float, "distinct": float}
"""What a record may hold, and of which kind it is."""


def checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record of a run. BardletError where an entry is not of its kind."""
    for name, value in record.items():
        kind = RECORD.get(name)
        if kind and value is not None and type(value) not in ((float, int) if kind is float else (kind,)):
            raise BardletError(f"{where}: record.{name} is {shown(value)}, which it cannot be; put back a copy")
    return record


def read_facts(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. BardletError where it is not what `save` was given by a run."""
    path = folder / "trainer.json"
    facts = files.read_json(path)
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


def settings(run: Path, changed: bool = False) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the record with which a run goes on: of its run.toml, where that is as the run wrote it.

    One that was changed, or damaged, or is gone, is replaced by what the newest whole checkpoint knows, and a notice
    says so; unless it can be read and `changed` says that it counts.
    """
    path = run / "run.toml"
    if sealed(path) or not run.is_dir():
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
    facts = read_facts(folder)
    log.warning("%s: %s; going on with the settings that %s has%s", path,
                "changed or damaged" if path.exists() else "missing", folder.name,
                "" if changed or not path.exists() else " (--allow-change takes what it says)")
    config = from_mapping(facts["config"], str(folder / "trainer.json"))
    return config, {**facts["record"], "steps": facts["step"]}


# ---------------------------------------------------------------- metrics.jsonl


def _sealed(line: dict[str, Any]) -> str:
    """`line` as JSON whose last key is the CRC-32 of the text before it."""
    text = json.dumps(line)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """One line at the end of metrics.jsonl."""
    text = _sealed(line)
    with files.writing(run / "metrics.jsonl", len(text)), open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(text)


def _plain(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl: a step, and numbers by name; None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if sound and all(value is None or isinstance(value, int | float) for value in line.values()) else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl whose CRC fits: a kill can leave half a line at the end, a bad disk another one."""
    path, lines = run / "metrics.jsonl", []
    if not os.path.lexists(path):
        return []
    texts = files.inside(run, path.name).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        head, _, crc = text.rpartition(', "crc": "')
        line = _plain(head + "}") if crc[:-2] == f"{zlib.crc32((head + '}').encode()):08x}" else None
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            log.warning("%s: line %d is damaged, and left out", path, number)
    return lines


def cut_metrics(run: Path, step: int, evaluated: int | None = None) -> list[dict[str, Any]]:
    """Drop the lines after `step` (they will be made again), and return those that stay.

    evaluated: the last step whose evaluation stays; None: `step` itself.
    """
    until = step if evaluated is None else evaluated
    lines = [line for line in read_metrics(run) if line["step"] <= (until if "val_loss" in line else step)]
    text = "".join(_sealed(line) for line in lines)
    files.write_text(run / "metrics.jsonl", text)
    return lines
