import torch
import torch.nn as nn
import torch.nn.functional as F

n_embd = 32
block_size = 8


class Head(nn.Module):
    """One head. Still fuzzy on why value is separate from x, ask in the discord"""

    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.head_size = head_size

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        affinities = (q @ k.mT) / self.head_size ** 0.5
        affinities = affinities.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(affinities, dim=-1) @ v
