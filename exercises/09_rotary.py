"""RMSNorm and rotary positions. A norm without a mean, and positions as rotations.

Write RMSNorm.forward and rotate. Then run, in the folder above this file:

    bardlet check exercises/09_rotary.py  # with --hint: a hint

Explained in the papers that the page names, and in docs/rungs/09-rotary.md.
"""
# exercise: rotary

import torch
import torch.nn as nn


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        """Divide each row by the root of its mean square (eps added), then scale: (..., C) -> (..., C)."""
        raise NotImplementedError("write RMSNorm.forward")


def angles(T, D):
    frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)  # (D/2): pair 0 rotates fastest
    angle = (torch.arange(T)[:, None] * frequency).repeat(1, 2)  # (T, D/2) -> (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of x (..., T, D) by their angles; cos and sin are (T, D)."""
    raise NotImplementedError("write rotate")
