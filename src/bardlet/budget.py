"""Minutes, a machine and a text become a plan: tokenizer, model, batch, regularisation, and the loss to expect.

Each choice is a rule with its reason, taken from measured runs (the table is in LOG.md). Whatever somebody sets
himself stays as it is. How many steps fit is decided later, by the run's own steps (`clock.py`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bardlet import __version__, clock, loss, models, optim
from bardlet import dist as distributed
from bardlet.config import TrainConfig
from bardlet.dist import Dist
from bardlet.survey import Survey
from bardlet.train import Stage, Trainer

# ---------------------------------------------------------------- the machine

COMPILED = 1.4
"""How many times as fast a compiled step is."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine trains, uncompiled: seconds for a token by the floating-point operations it takes."""

    points: tuple[tuple[float, float], ...]
    """(operations of a token, seconds of a token), by growing operations."""

    def seconds(self, operations: float) -> float:
        """For a token that takes so many operations: between the measured models on a line in logarithms, beyond them
        as the nearest."""
        x, y = np.log(np.array(self.points)).T
        wanted = math.log(operations)
        beyond = max(0.0, wanted - x[-1]) # smaller models than the smallest pay for each step, not for its operations
        return float(np.exp(np.interp(wanted, x, y) + beyond))


def operations(config: TrainConfig, vocab_size: int) -> float:
    """Floating-point operations of a token in training: 6 for each weight it is multiplied by, and attention."""
    per_block = 12 * config.n_embd**2 + config.n_embd * config.block_size
    return 6.0 * (config.n_layer * per_block + config.n_embd * vocab_size)


def calibrate(config: TrainConfig, dist: Dist, threads: int, cache: Path) -> Speed:
    """How fast this machine trains: measured on three small models in a few seconds, then kept in `cache`.

    Args:
        config: its device, precision and kind of model count, nothing else.
        cache: the folder of what was measured.
    """
    gpu = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else ""
    key = {"processor": gpu or distributed.processor(), "threads": threads, "processes": dist.world, "dtype": config.dtype,
           "model": config.model, "torch": torch.__version__, "bardlet": __version__}
    path = cache / "speed.json"
    known: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = [entry for entry in json.loads(path.read_text(encoding="utf-8")) if isinstance(entry["points"], list)]
    for entry in known:
        with suppress(ValueError, TypeError, KeyError):
            if entry["machine"] == key:
                return Speed(tuple((float(a), float(b)) for a, b in entry["points"]))
    speed = _measure(config, dist)
    ...
    return speed
