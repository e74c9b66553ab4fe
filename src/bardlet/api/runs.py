"""List, compare and delete run folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardlet.api import arguments
from bardlet.config.finetuning import RolloutConfig
from bardlet.config.toml import read_toml
from bardlet.errors import BardletError
from bardlet.run import lock
from bardlet.run.metrics import read_metrics
from bardlet.run.record import checked


@dataclass(frozen=True)
class RunSummary:
    """A run folder in one line. None: not known yet.

    state: "finished", "running", "stopped" or "damaged". steps: that are done; of a stopped run, those that `resume`
    keeps. result: the main figure of the stage, in words. val_loss: in nats per token; None for reinforcement
    learning, which has `reward`, the held-out reward. minutes: of training.
    """

    folder: str
    command: str
    text: str | None
    model: str | None
    parameters: int | None
    state: str
    steps: int | None
    val_loss: float | None
    reward: float | None
    result: str
    minutes: float | None
    megabytes: float
    modified: float
    """Time of the last change, in seconds since 1970."""


def runs(root: str | os.PathLike[str] = "runs") -> list[RunSummary]:
    """Return a summary of every run below a folder, the newest first.

    Args:
        root: the folder to search, at most three levels deep, so that each rung and seed of a ladder counts.

    Returns:
        The summaries; empty if there is no folder runs/ yet. A damaged run has the state "damaged".

    Raises:
        BardletError: no such folder.
    """
    root = Path(arguments.path(root, "bardlet.runs: root"))
    if root == Path("runs") and not root.exists():
        return []
    if not root.is_dir():
        raise BardletError(f"{root}: no such folder; `bardlet train` creates runs")
    summaries = [summarize(path.parent) for path in _run_files(root)]
    return sorted(summaries, key=lambda run: -run.modified)


def _run_files(root: Path) -> Iterator[Path]:
    """Yield each run.toml at most three folders below `root`, which includes the runs of ladders.

    Hidden folders are left out, such as that of runs that were deleted in the browser.
    """
    for depth in range(4):
        yield from (path for path in root.glob("*/" * depth + "run.toml") if not path.parent.is_symlink()
                    and not any(part.startswith(".") for part in path.relative_to(root).parts))


def summarize(folder: Path) -> RunSummary:
    """Return the summary of a run folder; a damaged folder gets the state "damaged" and raises nothing."""
    size, modified = _size_and_time(folder)
    try:
        config, record = read_toml(folder / "run.toml")
        checked(record, str(folder / "run.toml"))
    except BardletError:
        unknown = (None,) * 3
        return RunSummary(str(folder), "?", *unknown, "damaged", *unknown, "", None, size / 1e6, modified)
    state = "finished" if record.get("finished") else "running" if _in_use(folder) else "stopped"
    last = _last_line(folder)
    loss = _number(record.get("val_loss", last.get("val_loss")))
    reward = None
    if isinstance(config, RolloutConfig):
        loss, reward = None, _number(record.get("reward_after", None if loss is None else -loss))
    seconds = record.get("seconds") or last.get("seconds")
    # its last line of metrics may be older or newer than the checkpoint
    steps = {"finished": record.get("steps"), "stopped": record.get("saved", 0)}.get(state, last.get("step"))
    return RunSummary(
        str(folder), config.command, record.get("text"), getattr(config, "model", None) or _model_type(folder),
        record.get("parameters"), state, steps, loss, reward,
        _result(config.command, record, loss, reward), None if seconds is None else seconds / 60, size / 1e6, modified)


def _size_and_time(folder: Path) -> tuple[int, float]:
    """Return the bytes of a folder and the time of its last change; files may vanish while a run saves."""
    size, modified = 0, 0.0
    for path in folder.rglob("*"):
        with suppress(OSError):
            status = path.lstat()
            modified = max(modified, status.st_mtime)
            size += status.st_size if path.is_file() and not path.is_symlink() else 0
    return size, modified


def _in_use(folder: Path) -> bool:
    """Return True if a process trains the run, or if its lock cannot be read."""
    try:
        return lock.holder(folder) is not None
    except BardletError:
        return True


def _result(command: str, record: dict[str, Any], loss: float | None, reward: float | None) -> str:
    """Return the main figure of a run in words; empty if there is none yet."""
    accuracy = "AUC {:.2f}" if command == "kto" else "{:.0%} of pairs"
    for name, form in (("bleu", "BLEU {:.1f}"), ("accuracy", accuracy)):
        if (value := _number(record.get(name))) is not None:
            return form.format(value)
    if reward is not None:
        return f"reward {reward:.3f}"
    if loss is None:
        return ""
    if command == "train" and (characters := _number(record.get("characters_per_token"))):
        return f"{_number(record.get('nats_per_char')) or loss / characters:.4f} nats/char"
    return f"{loss:.4f} nats/token"


def _last_line(folder: Path) -> dict[str, Any]:
    """Return the last line of metrics.jsonl, with the last validation loss."""
    try:
        lines = read_metrics(folder)
    except (BardletError, OSError):
        return {}
    losses = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    return {**lines[-1], "val_loss": losses[-1] if losses else None} if lines else {}


def _model_type(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def check_deletable(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a run that can be deleted.

    Raises:
        BardletError: no run, a link, a folder with other runs below it, or a run in use.
    """
    folder = Path(arguments.path(folder, "bardlet.delete: folder"))
    if folder.is_symlink() or not (folder / "run.toml").is_file():
        raise BardletError(f"{folder}: not a run folder (it has no run.toml); nothing was deleted")
    if inner := sorted(str(path.parent) for path in folder.rglob("run.toml") if path.parent != folder):
        raise BardletError(f"{folder}: contains other runs ({inner[0]}{', ...' * (len(inner) > 1)}); "
                           "nothing was deleted; delete those first")
    if holder := lock.holder(folder):
        raise lock.in_use(folder, holder)
    return folder


def delete(folder: str | os.PathLike[str]) -> None:
    """Delete a run folder with everything in it.

    Args:
        folder: the run folder, or a `Run`.

    Raises:
        BardletError: no run, a link, a folder with other runs below it, or a run in use. Nothing was deleted.
    """
    folder = check_deletable(folder)
    with lock.locked(folder):  # no process can resume the run meanwhile
        for path in folder.iterdir():
            if path.name not in lock.FILES:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder.resolve())  # "." cannot be removed by that name
