"""Losses as pure functions of tensors. Each is a sum, and says over how many terms.

A mean of micro-batch means is not the mean of the batch as soon as targets are masked, so no function here
divides: the training step divides the sum by the number of unmasked targets of the whole global batch.

    B rows   T positions   V tokens of the vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

IGNORE = -100
"""A target that no loss is taken on (PyTorch's own number for it)."""

Batch = dict[str, torch.Tensor]
"""Named tensors that all have the rows of the batch in front, so that any slice of rows is a batch again."""


def next_token(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross-entropy of each next token, summed.

    Args:
        model: maps idx_BT to logits_BTV.
        batch: `idx` (B, T) int64, and `target` (B, T) int64 with IGNORE where nothing is to be learned.

    Returns:
        A scalar in nats, float32: -sum of log p(target).
    """
    logits_BTV = model(batch["idx"])
    V = logits_BTV.size(-1)
    target = batch["target"].reshape(-1)  # (B, T) -> (B*T)
    # in float32: bfloat16 has 8 bits of mantissa, too few to add up a softmax over a vocabulary
    return F.cross_entropy(logits_BTV.reshape(-1, V).float(), target, ignore_index=IGNORE, reduction="sum")


def translation(model: nn.Module, batch: Batch, smoothing: float = 0.0, prefix: bool = False) -> torch.Tensor:
    """The cross-entropy of each token of the targets, summed.

    Args:
        model: an encoder-decoder where `batch` has a `source` beside the target, else a decoder-only model.
        batch: as `pairs.Format` makes it.
        smoothing: the part of each target that is spread evenly over the vocabulary (Szegedy et al. 2016, *Rethinking
            the Inception Architecture*, section 7).
        prefix: a decoder-only model sees the source both ways.

    Returns:
        A scalar in nats, float32. The head is computed only where there is a target.
    """
    where_BT = batch["target"] != IGNORE
    if "source" in batch:
        logits_NV = model(batch["source"], batch["idx"], batch["source_length"], where_BT=where_BT)
    else:
        logits_NV = model(batch["idx"], prefix_B=batch["prefix"] if prefix else None, where_BT=where_BT)
    target_N = batch["target"][where_BT]
    return F.cross_entropy(logits_NV.float(), target_N, reduction="sum", label_smoothing=smoothing)


def count_targets(batch: Batch) -> int:
    """How many targets of `batch` the loss is taken on."""
    return int((batch["target"] != IGNORE).sum())
