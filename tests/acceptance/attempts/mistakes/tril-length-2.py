import torch
from torch import nn
import torch.nn.functional as F

n_embd = 64
n_head = 8
block_size = 32


class SelfAttentionHead(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.wk = nn.Linear(n_embd, head_size, bias=False)
        self.wq = nn.Linear(n_embd, head_size, bias=False)
        self.wv = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(head_size, head_size)))

    def forward(self, x):
        T = x.shape[1]
        k, q, v = self.wk(x), self.wq(x), self.wv(x)
        att = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5
        att = att.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


class MultiHeadAttention(nn.Module):
    """num_heads small heads next to each other"""

    def __init__(self, num_heads):
        super().__init__()
        self.heads = nn.ModuleList([SelfAttentionHead(n_embd // num_heads) for _ in range(num_heads)])

    def forward(self, x):
        return torch.cat([h(x) for h in self.heads], dim=-1)
