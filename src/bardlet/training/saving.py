"""Checkpoints of a shared model: each process writes its rows, and the training goes on while they reach the disk.

Writing to the system's cache takes as long as a copy in memory would, and needs no memory of the process. A thread then
flushes the file and computes its checksum. Rank 0 waits for all of them, writes the manifest and renames the folder, so
a checkpoint is complete or absent at any moment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bardlet.run import checkpoint, shares
from bardlet.runtime import atomic, heartbeat, manifest, parallelize
from bardlet.runtime.distributed import Dist
from bardlet.training import optim
from bardlet.training.state import Trainer

PATIENCE = timedelta(hours=1)
"""Longest time that rank 0 waits for the files of the others; a lost process ends the run long before."""


def own_rows(trainer: Trainer) -> dict[str, shares.Rows]:
    """Return what this process saves: its rows of weights, optimizer state and average; rank 0 also all that is whole.
    """
    tensors: dict[str, Any] = {f"parameter/{name}": p.detach() for name, p in trainer.model.named_parameters()}
    tensors |= {f"optimizer/{name}": x for name, x in optim.state_tensors(trainer.optimizers, trainer.model).items()}
    tensors |= {f"average/{name}": x for name, x in trainer.average.items()}
    stage_state = trainer.objective.stage_state
    tensors |= {f"stage/{name}": x for name, x in (stage_state.tensors() if stage_state else {}).items()}
    tensors["rng"] = torch.get_rng_state()
    rows = {}
    for name, x in tensors.items():
        own = parallelize.local(x)
        if own is not x:
            rows[name] = shares.Rows(own, parallelize.first_row(x), len(x))
        elif trainer.dist.main:
            rows[name] = shares.Rows(own, 0, len(x) if x.ndim else 1)
    return rows


class Saver:
    """Saves the checkpoints of a run whose model is shared; all ranks call its methods at the same steps."""

    def __init__(self, dist: Dist) -> None:
        self.dist = dist
        self._thread = ThreadPoolExecutor(1, "saver")
        self._future: Future[int] | None = None
        self._number = 0

    def start(self, run: Path, step: int, rows: Mapping[str, shares.Rows], metadata: Mapping[str, Any],
              keep: int) -> None:
        """Write this rank's file, and finish the checkpoint in the background.

        Args:
            run: the run folder.
            step: optimizer steps completed.
            rows: this rank's rows of all tensors.
            metadata: see `checkpoint.save`.
            keep: number of checkpoints to keep.

        Raises:
            BardletError: the file cannot be written; earlier checkpoints are unchanged.
        """
        self.wait()
        folder = run / "checkpoints" / f"step-{step:08d}"
        temporary = folder.with_name(f".{folder.name}.shares.tmp")
        needed = sum(each.tensor.nbytes for each in rows.values()) + 100_000
        if self.dist.main:
            with atomic.explain_write_errors(folder, needed):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        self.dist.broadcast_int(0)  # the folder is there
        path = temporary / checkpoint.share_names(self.dist.world)[self.dist.rank]
        with atomic.explain_write_errors(path, needed):
            shares.write(path, rows)
            if self.dist.main:
                (temporary / "trainer.json").write_text(json.dumps({"step": step, **metadata}), encoding="utf-8")
        self._number += 1
        self._future = self._thread.submit(self._finish, path, needed, folder, keep)

    def _finish(self, path: Path, needed: int, folder: Path, keep: int) -> int:
        """Flush this rank's file and compute its checksum; on rank 0, complete the checkpoint. Return its step."""
        with atomic.explain_write_errors(path, needed):
            atomic.flush(path)
            entry = manifest.file_entry(path)
        store, prefix = heartbeat.store(PATIENCE), f"bardlet/{heartbeat.attempt()}/save/{self._number}"
        store.set(f"{prefix}/{self.dist.rank}", json.dumps(entry))
        if self.dist.main:
            names = checkpoint.share_names(self.dist.world)
            entries = {name: json.loads(store.get(f"{prefix}/{rank}")) for rank, name in enumerate(names)}
            checkpoint.complete(path.parent, folder, entries, keep)
        return int(folder.name[5:])

    def saved(self) -> int | None:
        """Return the step of a checkpoint that was completed since the last call; raise what went wrong with it."""
        if self._future is None or not self._future.done():
            return None
        done, self._future = self._future, None
        return done.result()

    def wait(self) -> int | None:
        """Wait for the checkpoint in progress, and return what `saved` does."""
        if self._future is not None:
            self._future.exception()
        return self.saved()
