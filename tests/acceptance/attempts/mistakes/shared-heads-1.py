import torch
import torch.nn as nn
import torch.nn.functional as F

B, T, C = 4, 8, 32


class Head(nn.Module):
    def __init__(self, n_embd, head_size, block_size):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer('tril', torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        t = x.shape[1]
        q = self.query(x)
        k = self.key(x)
        v = self.value(x)
        w = q @ k.transpose(-2, -1) / (k.shape[-1] ** 0.5)
        w = w.masked_fill(self.tril[:t, :t] == 0, float('-inf'))
        w = F.softmax(w, dim=-1)
        return w @ v


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        head_size = n_embd // n_head
        self.heads = nn.ModuleList([Head(n_embd, head_size, block_size)] * n_head)

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


mha = MultiHeadAttention(n_embd=C, n_head=4, block_size=T)
out = mha(torch.randn(B, T, C))
assert out.shape == (B, T, C)
