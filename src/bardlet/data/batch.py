"""A training batch: tensors by name, whose rows micro-batches and ranks share."""

from __future__ import annotations

import torch

Batch = dict[str, torch.Tensor]
"""Named tensors that all have the rows of the batch in front, so that any slice of rows is a batch again."""
