"""Decide how many processes of a run share one copy of the model."""

from __future__ import annotations

import os
from typing import Any

from bardlet.config.settings import Settings
from bardlet.planning import memory
from bardlet.runtime.distributed import Dist

COPY = 24
"""Bytes per parameter of a copy: itself, its gradient, DistributedDataParallel's buffer of it, AdamW's two averages,
and the average of the weights."""


def ranks_per_copy(config: Settings, model: Any, dist: Dist) -> int:
    """Return how many ranks share one copy of `model`: 1, those of a machine, or all; the same on all ranks.

    Shares send three times the bytes of copies. So with --shard auto they are used only if a copy would take more than
    half of the memory of a process. For the same reason each of several machines keeps a copy of its own if it has room
    for one. Sums over shares have the bits of one number of processes only, so --elastic keeps copies.
    """
    if dist.world == 1 or config.shard == "off":
        return 1
    free = memory.free_here(dist)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def fits(ranks: int) -> bool:
        return not dist.all_max(int(free is not None and COPY * trained / ranks > free / 2))

    if config.shard == "auto" and (dist.slices or fits(1)):
        return 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world))  # set by torchrun: ranks on this machine
    return local if 1 < local < dist.world and dist.world % local == 0 and fits(local) else dist.world
