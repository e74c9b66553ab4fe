"""LayerNorm. The norm itself, and a block that has one before each part.

Write LayerNorm.forward and Block.forward. Then run, in the folder above this file:

    bardlet check exercises/07_layer_norm.py  # with --hint: a hint

Explained in the lecture at 1:32:51, and in docs/rungs/07-layer-norm.md.
"""
# exercise: layer-norm

import torch
import torch.nn as nn

n_embd = 32  # C channels


class LayerNorm(nn.Module):
    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        """Bring each row (one position's channels) to mean 0 and variance 1, then scale and shift: (B, T, C)."""
        raise NotImplementedError("write LayerNorm.forward")


class Block(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        self.sa = attention or nn.Linear(n_embd, n_embd)  # attention, from the exercise before
        self.ffwd = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.ln1, self.ln2 = LayerNorm(n_embd), LayerNorm(n_embd)

    def forward(self, x):
        """Add to x as before, with ln1 before attention and ln2 before the feed-forward layer."""
        raise NotImplementedError("write Block.forward")
