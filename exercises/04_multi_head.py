"""Several heads. Small heads in parallel, their outputs side by side.

Write MultiHeadAttention.__init__ and MultiHeadAttention.forward. Then run, in the folder above this file:

    bardlet check exercises/04_multi_head.py  # with --hint: a hint

Explained in the lecture at 1:21:59, and in docs/rungs/04-multi-head.md.
"""
# exercise: multi-head

import torch
import torch.nn as nn
from torch.nn import functional as F

n_embd, block_size = 32, 8  # C channels, T positions at most


class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        B, T, C = x.shape
        q, k = self.query(x), self.key(x)  # (B, T, C) -> (B, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, D) @ (B, D, T) -> (B, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class MultiHeadAttention(nn.Module):
    def __init__(self, num_heads, head_size):
        """Make the heads."""
        super().__init__()
        raise NotImplementedError("write MultiHeadAttention.__init__")

    def forward(self, x):
        """Return the outputs of all heads side by side: (B, T, C) -> (B, T, num_heads * head_size)."""
        raise NotImplementedError("write MultiHeadAttention.forward")
