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
"""Tokens, about, that a processor computes at once of rows of many lengths."""


def bucket_by_length(where_RT: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Rows of similar lengths together, so that little padding is computed: [(their places, the longest's length)].

    A row is as long as its last True says. A piece has about PIECE tokens, and all have equally many rows, or
    nearly. On a GPU, for which such pieces are too small, there is one.
    """
    R, T = where_RT.shape
    if where_RT.device.type != "cpu":
        return [(torch.arange(R, device=where_RT.device), T)]
    length_R = ((torch.arange(T) + 1) * where_RT).amax(1).clamp_min(1)
    order = length_R.argsort(stable=True)
    number = min(R, max(1, round(int(length_R.sum()) / BUCKET_TOKENS)))
    return [(rows, int(length_R[rows[-1]])) for rows in order.tensor_split(number)]


def unbucket(made: Sequence[torch.Tensor], rows: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """What was made of each of the `pieces`, rows in front, with the rows where they were."""
    return torch.cat(list(made))[torch.cat([some for some, _ in rows]).argsort()]


def map_buckets(where_RT: torch.Tensor,
              compute: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:  # fmt: skip
    """What `compute`(rows, width), tensors (rows, width), makes of each of the `pieces`: (R, T) each, 0 behind it."""
    rows = bucket_by_length(where_RT)
    made = [[F.pad(x, (0, where_RT.shape[1] - width)) for x in compute(some, width)] for some, width in rows]
    return [unbucket(parts, rows) for parts in zip(*made, strict=True)]


def log_probability(model: nn.Module, idx_RT: torch.Tensor, target_RT: torch.Tensor,
                    temperature: float = 1.0) -> torch.Tensor:  # fmt: skip
    """log p of each target that is not IGNORE: (R, T) float32 in nats, 0 elsewhere.

    Args:
        model: decoder-only. idx_RT, target_RT: int64. temperature: at which the targets were drawn.
    """
    def compute(rows: torch.Tensor, width: int) -> tuple[torch.Tensor]:
        target = target_RT[rows, :width]
        loss_RT = model(idx_RT[rows, :width], target, reduction="none", temperature=temperature)
        return (0 - loss_RT,)  # not -loss_RT, which has -0 where there is no target

    return map_buckets(target_RT != IGNORE, compute)[0]


def pair_log_probability(model: nn.Module, batch: Batch) -> torch.Tensor:
    """log p of both answers of each pair, the whole of each: (B, 2) float32 in nats, 0 for one without targets.

    Args:
        model: decoder-only.
        batch: `idx`, `target` (B, 2, T) int64, the chosen answer first, IGNORE outside the answers.
    """
    idx_RT, target_RT = batch["idx"].flatten(0, 1), batch["target"].flatten(0, 1)  # R: both answers of all pairs
    return log_probability(model, idx_RT, target_RT).sum(1).view(-1, 2)


def pair_rewards(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What a reward model says of both answers of each pair: (B, 2) float32.

    Args:
        model: with a scalar head. batch: `idx` (B, 2, T) and `length` (B, 2) int64, the chosen answer first.
    """
    idx_RT, length_R = batch["idx"].flatten(0, 1), batch["length"].flatten()  # R: both answers of all pairs
    at_T = torch.arange(idx_RT.shape[1], device=idx_RT.device)
    rows = bucket_by_length(at_T < length_R[:, None])
    return unbucket([model(idx_RT[some, :width], length_R[some]) for some, width in rows], rows).view(-1, 2)


def preference_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """`bradley_terry_loss` of a reward model on a batch of pairs, of which those of length 0 do not count."""
    reward_B2 = pair_rewards(model, batch)[batch["length"][:, 0] > 0]
    return bradley_terry_loss(*reward_B2.unbind(1))
