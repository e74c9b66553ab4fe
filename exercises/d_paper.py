"""A feature from a paper. The squared ReLU.

Write FeedForward.forward. Then run, in the folder above this file:

    bardlet check exercises/d_paper.py  # with --hint: a hint

Explained in the lecture's exercises, and in docs/exercises/paper.md.
"""
# exercise: paper

import torch.nn as nn
from torch.nn import functional as F

n_embd, n_inner = 32, 128  # C channels, and 4C inside


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(n_embd, n_inner, bias=False)
        self.down = nn.Linear(n_inner, n_embd, bias=False)

    def forward(self, x):
        """Square the ReLU of the inner layer, as in Primer (So and others, 2021): (B, T, C) -> (B, T, C)."""
        raise NotImplementedError("write FeedForward.forward")
