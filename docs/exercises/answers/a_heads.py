"""The answer of an exercise; docs/starters.py makes exercises/a_heads.py from it."""
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
        B, T, C = x.shape
        D = C // n_head
        q, k, v = (layer(x).view(B, T, n_head, D).transpose(1, 2) for layer in (self.query, self.key, self.value))
        score = q @ k.transpose(-2, -1) * D ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        out = F.softmax(score, dim=-1) @ v  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))  # (B, H, T, D) -> (B, T, C)
