"""The answer of an exercise; docs/starters.py makes exercises/03_one_head.py from it."""
# exercise: one-head

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
        """Return each position's weighted sum of values: (B, T, C) -> (B, T, D), where D is head_size."""
        B, T, C = x.shape
        q, k = self.query(x), self.key(x)  # (B, T, C) -> (B, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, D) @ (B, D, T) -> (B, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(score, dim=-1) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)
