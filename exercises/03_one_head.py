"""One head of self-attention. The equal weights of the average become weights computed from the text.

Write Head.forward. Then run, in the folder above this file:

    bardlet check exercises/03_one_head.py  # with --hint: a hint

Explained in the lecture at 1:02:00, and in docs/rungs/03-one-head.md.
"""
# exercise: one-head

import torch
import torch.nn as nn
from torch.nn import functional as F

n_embd, block_size = 32, 8  # C channels, T positions at most


class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        """Return each position's weighted sum of values: (B, T, C) -> (B, T, D), where D is head_size."""
        raise NotImplementedError("write Head.forward")
