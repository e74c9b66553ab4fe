"""The answer of an exercise; docs/starters.py makes exercises/09_rotary.py from it."""
# exercise: rotary

import torch
import torch.nn as nn


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        """Divide each row by the root of its mean square (eps added), then scale: (..., C) -> (..., C)."""
        return x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.weight


def angles(T, D):
    frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)  # (D/2): pair 0 rotates fastest
    angle = (torch.arange(T)[:, None] * frequency).repeat(1, 2)  # (T, D/2) -> (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of x (..., T, D) by their angles; cos and sin are (T, D)."""
    left, right = x.chunk(2, dim=-1)  # twice (..., T, D/2)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
