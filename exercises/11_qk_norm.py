"""QK-norm. Queries and keys are normalized, then rotated, then multiplied.

Write Attention.forward. Then run, in the folder above this file:

    bardlet check exercises/11_qk_norm.py  # with --hint: a hint

Explained in the papers that the page names, and in docs/rungs/11-qk-norm.md.
"""
# exercise: qk-norm

import torch
import torch.nn as nn
from torch.nn import functional as F

n_embd, n_head, block_size = 32, 4, 8  # C channels, H heads, T positions at most


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.weight


def angles(T, D):
    frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)  # (D/2): pair 0 rotates fastest
    angle = (torch.arange(T)[:, None] * frequency).repeat(1, 2)  # (T, D/2) -> (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    left, right = x.chunk(2, dim=-1)  # twice (..., T, D/2)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))
        self.key_norm, self.query_norm = RMSNorm(n_embd // n_head), RMSNorm(n_embd // n_head)

    def heads(self, x):
        B, T, C = x.shape
        return x.view(B, T, n_head, C // n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x):
        """Return attention whose queries and keys are normalized, then rotated: (B, T, C) -> (B, T, C)."""
        raise NotImplementedError("write Attention.forward")
