"""Many heads at once. All heads in one tensor, as another dimension of the batch.

Write MultiHeadAttention.forward. Then run, in the folder above this file:

    bardlet check exercises/a_heads.py  # with --hint: a hint

Explained in the lecture's exercises, and in docs/exercises/heads.md.
"""
# exercise: heads

import torch
import torch.nn as nn
from torch.nn import functional as F

n_embd, n_head, block_size = 32, 4, 8  # C channels, H heads, T positions at most


class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(n_embd, n_embd, bias=False)  # head h has the channels h * D to (h + 1) * D - 1 of each
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        """Compute all heads at once, without a loop, then the projection: (B, T, C) -> (B, T, C)."""
        raise NotImplementedError("write MultiHeadAttention.forward")
