"""Measure a machine's training speed on a few models, and estimate it for others."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from bardlet import __version__, models
from bardlet.config.model import LLAMA
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
"""(layers, heads, channels) of the models timed for a calibration."""

COMPILED, COMPILED_PAIRS = 1.7, 1.1
"""Approximate speedup from compilation, for text and for sentence pairs, whose short rows have less attention."""

C = TypeVar("C", bound=FromScratch)

COLD, WARM = 40.0, 8.0
"""Seconds of compilation, measured on 2 quiet cores: the first time, and with a warm compiler cache."""

COMPILE_SHARE = 0.25
"""Maximum share of a run for compilation."""


@dataclass(frozen=True)
class Speed:
    """Training speed of a machine, uncompiled unless converted by `compiled`."""

    points: tuple[tuple[float, float], ...]
    """(floating-point operations per token, seconds per token), in ascending order."""

    def compiled(self) -> Speed:
        """Return the speed with compiled blocks."""
        return Speed(tuple((x, y / COMPILED) for x, y in self.points))

    def seconds(self, flops: float) -> float:
        """Return the seconds per token of a model with `flops` per training token.

        Between the timed models it interpolates log-log. Above the largest the time grows in proportion; below the
        smallest it is constant.
        """
        x, y = np.log(np.array(self.points)).T
        target = math.log(flops)
        return float(np.exp(np.interp(target, x, y) + max(0.0, target - x[-1])))


def worth_compiling(seconds: float, cost: float = COLD, speedup: float = COMPILED) -> bool:
    """Return True if a run of `seconds` saves more time than the `cost` of compilation, in seconds.

    Compilation may take COMPILE_SHARE of the run at most: its cost is an estimate, and the first thing to go wrong.
    """
    return seconds * (1 - 1 / speedup) > cost and cost <= COMPILE_SHARE * seconds


def flops_per_token(config: FromScratch, vocab_size: int) -> float:
    """Return the floating-point operations per training token: 6 per weight of the blocks and head, plus attention."""
    c = config.resolved()
    return 6.0 * (block_weights(c) + c.n_layer * c.n_embd * c.block_size + c.n_embd * vocab_size)


def block_weights(config: FromScratch) -> int:
    """Return the number of weights in the blocks' matrices, usually 12 n_embd^2 per block; no embeddings or head."""
    c = config.model_config(1)
    attention, inner = 2 * c.head_dim * (c.n_head + c.n_kv_head), (3 if c.model in LLAMA else 2) * c.n_inner
    cross_attention = attention if c.model == "encdec" else 0
    return c.n_embd * (c.n_layer * (attention + cross_attention + inner) + c.n_encoder_layer * (attention + inner))


def calibrate(dist: Dist, dtype: str, threads: int, cache: Path, seconds: float = math.inf) -> Speed:
    """Return this machine's training speed, from a few steps of three models; cached, so only the first call is slow.

    The smallest model is timed on every call. If it takes 1.5 times as long as before on a machine that is busy, all
    cached times are multiplied. If its time differs by this factor otherwise, the cached times are discarded.

    Args:
        dtype: fp32 or bf16, the precision of matrix products.
        threads: CPU threads.
        cache: the cache folder; entries are per machine, torch and bardlet version.
        seconds: planned length of the run; a short run times fewer models.
    """
    key = {**distributed.machine(dist, dtype, threads), "bardlet": __version__}
    started = time.monotonic()
    points, cached = [_time_model(TIMED_SHAPES[0], dist, dtype)], _cached_points(cache, key)
    busy, ratio = clock.slowdown(dist) > 1, points[0][1] / cached[0][1] if cached else math.inf
    if dist.broadcast_int(int(1 / 1.5 < ratio < 1.5)):
        points = cached or points  # the cache may be empty on another machine's ranks
    elif dist.broadcast_int(int(busy and 1.5 <= ratio < math.inf)):
        points = [(flops, ratio * duration) for flops, duration in cached] or points
    else:
        for shape in TIMED_SHAPES[1:]:
            # once a step takes a second, skip the larger models
            slow, hurry = points[-1][1] * _timed_rows(dist) * 128 > 1.0, time.monotonic() - started > 0.03 * seconds
            if dist.broadcast_int(int(slow or hurry)):
                break
            try:
                points.append(_time_model(shape, dist, dtype))
            except BardletError:  # does not fit in memory; all ranks agree
                break
        if dist.main and (len(points) == len(TIMED_SHAPES) or slow) and not busy:
            runtime_cache.write(cache / "machines", key, {"points": points})
    # all ranks must choose the same model: use rank 0's times
    points = (points + [points[0]] * len(TIMED_SHAPES))[:dist.broadcast_int(len(points))]
    return Speed(tuple((float(dist.broadcast_int(round(x))), dist.broadcast_int(round(y * 1e15)) / 1e15)
                       for x, y in points))


def _cached_points(cache: Path, key: dict[str, object]) -> list[tuple[float, float]]:
    """Return the cached points of this machine, or an empty list."""
    entry = runtime_cache.read(cache / "machines", key)
    return [(x, y) for x, y in entry["points"]] if entry else []


def _time_model(shape: tuple[int, int, int], dist: Dist, dtype: str) -> tuple[float, float]:
    """Return (flops, seconds) per token of a model, from a few training steps.

    Raises BardletError if they do not fit in memory.
    """
    config = with_shape(TrainConfig(block_size=128, batch_size=_timed_rows(dist) * dist.parts).resolved(), shape)
    tokens = torch.randint(256, (config.batch_size, config.block_size + 1))
    batch: Batch = {"idx": tokens[:, :-1], "target": tokens[:, 1:]}
    model = models.build(config.model_config(256)).to(dist.device)
    objective = Objective(lambda step: batch, losses.next_token_loss, losses.count_targets, lambda model: 0.0)
    trainer = Trainer(Path(), model, [], objective, config, dist, {"dtype": dtype}, Record())
    rows, _, free = memory.rows_that_fit(trainer)
    if rows < config.batch_size // dist.parts:
        raise BardletError(f"only {free / 1e6:,.0f} MB of memory are free, too little to time this machine; use "
                           "--steps instead of --minutes, or free some memory")
    return flops_per_token(config, 256), clock.seconds_per_step(trainer, 3, patience=1.0) / batch["idx"].numel()


def _timed_rows(dist: Dist) -> int:
    """Return the rows of 128 tokens per rank in a timed step: more on a GPU, where launches dominate small steps."""
    return 16 if dist.device.type == "cpu" else 256


def with_shape(config: C, shape: tuple[int, int, int]) -> C:
    """Return `config` with the shape (layers, heads, channels)."""
    return replace(config, n_layer=shape[0], n_head=shape[1], n_embd=shape[2])
