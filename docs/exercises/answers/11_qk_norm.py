"""The answer of an exercise; docs/starters.py makes exercises/11_qk_norm.py from it."""
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
        B, T, C = x.shape
        cos, sin = angles(T, C // n_head)
        q = rotate(self.query_norm(self.heads(self.query(x))), cos, sin)  # (B, H, T, D)
        k = rotate(self.key_norm(self.heads(self.key(x))), cos, sin)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, T)
        score = score.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        out = F.softmax(score, dim=-1) @ self.heads(self.value(x))  # (B, H, T, D)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))
