"""Continue an interrupted rung exactly where it stopped, as `bardlet resume` continues a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bardlet.config.settings import Settings
from bardlet.errors import BardletError
from bardlet.run import checkpoint
from bardlet.run import folder as run_folder
from bardlet.training.checkpointing import restore
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")


def find_checkpoint(run: Path, text_hash: str, same: Callable[[Settings], bool]) -> Path | None:
    """Return the checkpoint from which a rung can continue; None if it has to start at its first step.

    Args:
        run: the run folder of the rung.
        text_hash: hash of the ladder's text.
        same: returns True if settings train the same model as the rung's.
    """
    if not run.is_dir():
        return None
    try:
        if not checkpoint.steps_saved(run):
            return None
        config, record = run_folder.settings(run)
        folder = checkpoint.newest_intact(run)
        run_folder.verify_root(run, folder)
    except BardletError as error:
        log.warning("%s; training this rung again", error)
        return None
    return folder if same(config) and record.get("text_hash") == text_hash else None


def machine_of(folder: Path | None) -> dict[str, Any]:
    """Return the machine that wrote a checkpoint; empty for None."""
    return dict(checkpoint.read_metadata(folder)["machine"]) if folder else {}


def continue_from(trainer: Trainer, folder: Path) -> bool:
    """Restore a rung's trainer from a checkpoint. Return False if it would not continue bit for bit."""
    metadata, before = checkpoint.read_metadata(folder), machine_of(folder)
    different = [name for name, value in trainer.machine.items() if before.get(name) != value]
    different += [name for name in ("batch_size", "grad_accum")
                  if metadata["config"].get(name) != getattr(trainer.config, name)]
    if different:
        log.warning("%s: %s changed since it was interrupted; training this rung again", trainer.run, different[0])
        return False
    run_folder.remove_partial(trainer.run)
    trainer.record.fill(run_folder.settings(trainer.run)[1])
    lost = run_folder.repair_root(trainer.run)
    if lost:
        trainer.record.update(selected_by=None, selected_step=None, val_loss=None, averaged=None)
    restore(trainer, folder, best_is_lost=lost)
    log.info("%s: continuing after step %d of %d", trainer.run, trainer.state.step, trainer.state.steps)
    return True
