"""An average of the past. The mean over each position and all before it, in three ways.

Write average_by_loop, average_by_matrix and average_by_softmax. Then run, in the folder above this file:

    bardlet check exercises/02_averaging.py  # with --hint: a hint

Explained in the lecture at 0:42:13, and in docs/rungs/02-averaging.md.
"""
# exercise: averaging

import torch
from torch.nn import functional as F


def average_by_loop(x):
    """Return the mean over each position and all before it: (B, T, C) -> (B, T, C). Write two loops."""
    raise NotImplementedError("write average_by_loop")


def average_by_matrix(x):
    """Return the same without a loop: a product with a triangular matrix, (T, T) @ (B, T, C) -> (B, T, C)."""
    raise NotImplementedError("write average_by_matrix")


def average_by_softmax(x):
    """Return the same from scores (T, T) that are 0 for the past and -inf for the future."""
    raise NotImplementedError("write average_by_softmax")
