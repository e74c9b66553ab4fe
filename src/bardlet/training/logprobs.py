"""Log-probabilities of tokens and completions, computed in buckets of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bardlet.data.batch import Batch
from bardlet.ops.cross_entropy import IGNORE
from bardlet.training.losses import bradley_terry_loss

BUCKET_TOKENS = 1024
"""Approximate target tokens per length bucket on a CPU."""


def bucket_by_length(mask_RT: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Group rows of similar length to save padding: [(row indices, length of the longest row)].

    A row ends at its last True. A bucket holds about BUCKET_TOKENS tokens, and row counts differ by at most 1. On a
    GPU, where such small buckets would waste time, there is one bucket.
    """
    R, T = mask_RT.shape
    if mask_RT.device.type != "cpu":
        return [(torch.arange(R, device=mask_RT.device), T)]
    length_R = ((torch.arange(T) + 1) * mask_RT).amax(1).clamp_min(1)
    order = length_R.argsort(stable=True)
    number = min(R, max(1, round(int(length_R.sum()) / BUCKET_TOKENS)))
    return [(rows, int(length_R[rows[-1]])) for rows in order.tensor_split(number)]


def unbucket(results: Sequence[torch.Tensor], buckets: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Concatenate bucket results along dimension 0 and restore the row order."""
    return torch.cat(list(results))[torch.cat([rows for rows, _ in buckets]).argsort()]


def map_buckets(mask_RT: torch.Tensor,
                compute: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:  # fmt: skip
    """Apply `compute`(rows, width) to each length bucket; zero-pad its (rows, width) tensors and unbucket: (R, T)."""
    buckets = bucket_by_length(mask_RT)
    results = [[F.pad(x, (0, mask_RT.shape[1] - width)) for x in compute(rows, width)] for rows, width in buckets]
    return [unbucket(parts, buckets) for parts in zip(*results, strict=True)]


def log_probability(model: nn.Module, idx_RT: torch.Tensor, target_RT: torch.Tensor,
                    temperature: float = 1.0) -> torch.Tensor:  # fmt: skip
    """Return log p of each target: (R, T) float32 in nats, 0 where the target is IGNORE.

    Args:
        model: decoder-only. idx_RT, target_RT: int64. temperature: the targets' sampling temperature.
    """
    def compute(rows: torch.Tensor, width: int) -> tuple[torch.Tensor]:
        target = target_RT[rows, :width]
        loss_RT = model(idx_RT[rows, :width], target, reduction="none", temperature=temperature)
        return (0 - loss_RT,)  # -loss_RT would give -0.0 where there is no target

    return map_buckets(target_RT != IGNORE, compute)[0]


def pair_log_probability(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return log p of both completions of each pair: (B, 2) float32 in nats, 0 for one without targets.

    Args:
        model: decoder-only.
        batch: `idx`, `target` (B, 2, T) int64, the chosen completion first, IGNORE outside completions.
    """
    idx_RT, target_RT = batch["idx"].flatten(0, 1), batch["target"].flatten(0, 1)  # R: both completions of all pairs
    return log_probability(model, idx_RT, target_RT).sum(1).view(-1, 2)


def pair_rewards(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the rewards of both completions of each pair: (B, 2) float32.

    Args:
        model: with a scalar head. batch: `idx` (B, 2, T) and `length` (B, 2) int64, the chosen completion first.
    """
    idx_RT, length_R = batch["idx"].flatten(0, 1), batch["length"].flatten()  # R: both completions of all pairs
    position_T = torch.arange(idx_RT.shape[1], device=idx_RT.device)
    buckets = bucket_by_length(position_T < length_R[:, None])
    return unbucket([model(idx_RT[rows, :width], length_R[rows]) for rows, width in buckets], buckets).view(-1, 2)


def preference_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return a reward model's `bradley_terry_loss` on a batch of pairs; pairs of length 0 do not count."""
    reward_B2 = pair_rewards(model, batch)[batch["length"][:, 0] > 0]
    return bradley_terry_loss(*reward_B2.unbind(1))
