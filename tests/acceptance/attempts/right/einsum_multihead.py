import math

import torch
import torch.nn as nn


class Attention(nn.Module):
    """All heads at once with einsum.  b=batch, t/s=query/key position, h=head, d=head dim"""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.h = num_heads
        self.d = embed_dim // num_heads
        self.to_q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.to_k = nn.Linear(embed_dim, embed_dim, bias=False)
        self.to_v = nn.Linear(embed_dim, embed_dim, bias=False)
        self.to_out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        b, t, e = x.shape
        q = self.to_q(x).reshape(b, t, self.h, self.d)
        k = self.to_k(x).reshape(b, t, self.h, self.d)
        v = self.to_v(x).reshape(b, t, self.h, self.d)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.d)
        allowed = torch.tril(torch.ones(t, t, device=x.device, dtype=torch.bool))
        scores = scores.masked_fill(~allowed, -1e9)
        weights = torch.softmax(scores, dim=-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v)
        return self.to_out(out.reshape(b, t, e))


class FeedForward(nn.Sequential):
    def __init__(self, embed_dim: int, mult: int = 4):
        super().__init__(nn.Linear(embed_dim, mult * embed_dim), nn.ReLU(), nn.Linear(mult * embed_dim, embed_dim))


class TransformerLayer(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim=embed_dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))
