"""A training batch: named tensors, split by rows among micro-batches and ranks."""

from __future__ import annotations

import torch

Batch = dict[str, torch.Tensor]
"""Named tensors whose first dimension is the row of the batch, so that any slice of rows is also a batch."""
