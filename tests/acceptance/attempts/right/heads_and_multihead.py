from math import sqrt

import torch
from torch import nn


class SelfAttentionHead(nn.Module):
    def __init__(self, embed_dim, head_dim, max_len):
        super().__init__()
        self.wq = nn.Linear(embed_dim, head_dim, bias=False)
        self.wk = nn.Linear(embed_dim, head_dim, bias=False)
        self.wv = nn.Linear(embed_dim, head_dim, bias=False)
        # True = not allowed to look
        mask = torch.triu(torch.ones(max_len, max_len), diagonal=1).bool()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        T = x.size(1)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        scores = torch.bmm(q, k.transpose(1, 2)) / sqrt(q.size(-1))
        scores.masked_fill_(self.mask[:T, :T], float("-inf"))
        weights = scores.softmax(-1)
        return torch.bmm(weights, v)


class MultiHeadSelfAttention(nn.Module):
    """num_heads little heads, each gets embed_dim / num_heads channels, results glued together."""

    def __init__(self, embed_dim, num_heads, max_len):
        super().__init__()
        assert embed_dim % num_heads == 0, "embed_dim must be divisible by num_heads"
        head_dim = embed_dim // num_heads
        self.heads = nn.ModuleList(SelfAttentionHead(embed_dim, head_dim, max_len) for _ in range(num_heads))

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


if __name__ == "__main__":
    x = torch.randn(2, 5, 32)
    print(MultiHeadSelfAttention(32, 4, 8)(x).shape)  # want (2, 5, 32)
