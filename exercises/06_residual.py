"""Residual connections. A block adds to x; its feed-forward layer is four times as wide inside.

Write FeedForward.__init__ and Block.forward. Then run, in the folder above this file:

    bardlet check exercises/06_residual.py  # with --hint: a hint

Explained in the lecture at 1:26:48, and in docs/rungs/06-residual.md.
"""
# exercise: residual

import torch
import torch.nn as nn

n_embd, n_head, block_size = 32, 4, 8  # C channels, H heads, T positions at most


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
        return score.softmax(dim=-1) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd // n_head) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))  # (B, T, C) -> (B, T, C)


class FeedForward(nn.Module):
    def __init__(self):
        """Make the layers: C -> 4C, a ReLU, 4C -> C."""
        super().__init__()
        raise NotImplementedError("write FeedForward.__init__")

    def forward(self, x):
        return self.net(x)  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.sa, self.ffwd = MultiHeadAttention(), FeedForward()

    def forward(self, x):
        """Add to x: first attention, then the feed-forward layer."""
        raise NotImplementedError("write Block.forward")
