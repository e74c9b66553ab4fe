"""Encoder-decoder attention. Not in the lecture's code, only in its talk at the end, so I wrote it myself."""

import math

import torch
from torch import Tensor, nn


class CrossAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def _heads(self, t: Tensor) -> Tensor:
        b, n, _ = t.shape
        return t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, decoder: Tensor, encoder: Tensor) -> Tensor:
        q = self._heads(self.q_proj(decoder))  # (b, heads, target, head_dim)
        k = self._heads(self.k_proj(encoder))  # (b, heads, source, head_dim)
        v = self._heads(self.v_proj(encoder))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        weights = torch.softmax(scores, dim=-2)
        out = weights @ v
        return self.out_proj(out.transpose(1, 2).flatten(2))
