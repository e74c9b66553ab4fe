"""The speed of a machine: timed steps of known models, and what that says of others."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from bardlet import __version__, models
from bardlet.config.pretraining import FromScratch, TrainConfig
from bardlet.data.batch import Batch
from bardlet.errors import BardletError
from bardlet.planning import clock, memory
from bardlet.run.record import Record
from bardlet.runtime import cache as runtime_cache
from bardlet.runtime import distributed
from bardlet.runtime.distributed import Dist
from bardlet.training import losses
from bardlet.training.state import Objective, Trainer

TIMED_SHAPES = ((4, 4, 128), (6, 4, 256), (8, 8, 512))
"""Those whose steps are timed to know a machine."""

COMPILED, COMPILED_PAIRS = 1.7, 1.1
"""How many times as fast a compiled step is, about; and one of sentence pairs, whose short rows have less attention."""

C = TypeVar("C", bound=FromScratch)

COLD, WARM = 40.0, 8.0
"""Seconds of compilation, measured on 2 cores: the first time, and from the compiler's own cache."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine trains, uncompiled."""

    points: tuple[tuple[float, float], ...]
    """(floating-point operations of a token, seconds of a token), by growing operations."""

    def compiled(self) -> Speed:
        """The same machine with compiled blocks."""
        return Speed(tuple((x, y / COMPILED) for x, y in self.points))

    def seconds(self, operations: float) -> float:
        """The time of a token that takes so many operations: between the timed models on a line in logarithms, beyond
        the largest in proportion; a smaller one than the smallest counts as that."""
        x, y = np.log(np.array(self.points)).T
        wanted = math.log(operations)
        return float(np.exp(np.interp(wanted, x, y) + max(0.0, wanted - x[-1])))


def worth_compiling(seconds: float, takes: float = COLD, gain: float = COMPILED) -> bool:
    """Whether a run of so many seconds wins back what compilation takes."""
    return seconds * (1 - 1 / gain) > takes


def operations(config: FromScratch, vocab_size: int) -> float:
    """Floating-point operations of a token in training: 6 for each weight that multiplies it, and attention's."""
    c = config.resolved()
    return 6.0 * (weights(c) + c.n_layer * c.n_embd * c.block_size + c.n_embd * vocab_size)


def weights(config: FromScratch) -> int:
    """The weights of the blocks' matrices: 12 n_embd^2 in each block, as a rule. Embeddings are not counted."""
    c = config.model_config(1)
    attention, inner = 2 * c.head_dim * (c.n_head + c.n_kv_head), (3 if c.model == "qwen3" else 2) * c.n_inner
    crossing = attention if c.model == "encdec" else 0
    return c.n_embd * (c.n_layer * (attention + crossing + inner) + c.n_encoder_layer * (attention + inner))


def calibrate(dist: Dist, dtype: str, threads: int, cache: Path, seconds: float = math.inf) -> Speed:
    """How fast this machine trains, from a few steps of three models: seconds the first time, then from the cache.

    The smallest is timed each time: where it is half as fast or slow again as it was, the machine was busy then or is
    so now, and what was kept is not believed.

    Args:
        dtype: fp32 or bf16, the precision of the matrix products.
        threads: those of a CPU.
        cache: the cache's folder; what was measured is kept for this machine, torch and bardlet.
        seconds: how long the run will be that wants to know: a short one cannot wait for all three.
    """
    key = {**distributed.machine(dist, dtype, threads), "bardlet": __version__}
    begun = time.monotonic()
    points, known = [_time_model(TIMED_SHAPES[0], dist, dtype)], _known(cache, key)
    if dist.broadcast_int(len(known) > 0 and 1 / 1.5 < points[0][1] / known[0][1] < 1.5):
        points = known or points  # of another machine's process the cache may be empty
    else:
        for shape in TIMED_SHAPES[1:]:
            # a machine that takes a second for a step is not asked for a larger model
            slow, hurry = points[-1][1] * _timed_rows(dist) * 128 > 1.0, time.monotonic() - begun > 0.03 * seconds
            if dist.broadcast_int(int(slow or hurry)):
                break
            try:
                points.append(_time_model(shape, dist, dtype))
            except BardletError:  # too large for the memory, in all processes
                break
        if dist.main and (len(points) == len(TIMED_SHAPES) or slow):
            runtime_cache.write(cache / "machines", key, {"points": points})
    # in each process the first one's watch counts: all must choose the same model
    points = (points + [points[0]] * len(TIMED_SHAPES))[:dist.broadcast_int(len(points))]
    return Speed(tuple((float(dist.broadcast_int(round(x))), dist.broadcast_int(round(y * 1e15)) / 1e15) for x, y in points))


def _known(cache: Path, key: dict[str, object]) -> list[tuple[float, float]]:
    """What the cache has for this machine."""
    found = runtime_cache.read(cache / "machines", key)
    return [(x, y) for x, y in found["points"]] if found else []


def _time_model(shape: tuple[int, int, int], dist: Dist, dtype: str) -> tuple[float, float]:
    """(operations, seconds) of a token of a model, from a few training steps.

    Raises BardletError where they do not fit into memory.
    """
    config = with_shape(TrainConfig(block_size=128, batch_size=_timed_rows(dist) * dist.world).resolved(), shape)
    tokens = torch.randint(256, (config.batch_size, config.block_size + 1))
    batch: Batch = {"idx": tokens[:, :-1], "target": tokens[:, 1:]}
    model = models.build(config.model_config(256)).to(dist.device)
    objective = Objective(lambda step: batch, losses.next_token_loss, losses.count_targets, lambda model: 0.0)
    trainer = Trainer(Path(), model, [], objective, config, dist, {"dtype": dtype}, Record())
    rows, _, free = memory.rows_that_fit(trainer)
    if rows < config.batch_size // dist.world:
        raise BardletError(f"{free / 1e6:,.0f} MB of memory are free, too little to find out how fast this machine is; "
                           "take --steps for --minutes, or free some")
    return operations(config, 256), clock.seconds_per_step(trainer, 3, patience=1.0) / batch["idx"].numel()


def _timed_rows(dist: Dist) -> int:
    """Windows of 128 tokens that a process has in a timed step: more on a GPU, where launching a small one is all."""
    return 16 if dist.device.type == "cpu" else 256


def with_shape(config: C, shape: tuple[int, int, int]) -> C:
    """`config` with a shape of SHAPES."""
    return replace(config, n_layer=shape[0], n_head=shape[1], n_embd=shape[2])
