"""Decide whether the processes of a run shard the model or keep a copy of it each."""

from __future__ import annotations

import logging
from typing import Any

from bardlet.config.settings import Settings
from bardlet.planning import memory
from bardlet.runtime.distributed import Dist

log = logging.getLogger("bardlet")

COPY = 24
"""Bytes per parameter of a copy: itself, its gradient, DistributedDataParallel's buffer of it, AdamW's two averages,
and the average of the weights."""


def is_worthwhile(config: Settings, model: Any, dist: Dist) -> bool:
    """Return True if the processes should shard `model`, which is on this process's device; the same on all ranks.

    --shard auto: if a copy takes more than half of the memory that one of the processes has left. Sharded training
    sends three times the bytes, so copies are faster where there is room for them. Sums over shards have the bits of
    one number of processes only, so --elastic keeps copies.
    """
    if dist.world == 1 or config.shard == "off":
        return False
    if config.shard == "on":
        return True
    free = memory.free_here(dist)
    needed = COPY * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return not dist.slices and bool(dist.all_max(int(free is not None and needed > free // 2)))
