"""SwiGLU. A feed-forward layer with a gate.

Write SwiGLU.forward. Then run, in the folder above this file:

    bardlet check exercises/10_swiglu.py  # with --hint: a hint

Explained in the papers that the page names, and in docs/rungs/10-swiglu.md.
"""
# exercise: swiglu

import torch.nn as nn
from torch.nn import functional as F

n_embd, n_inner = 128, 352  # C channels; inside, 8/3 times as many, rounded up to a multiple of 32


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(n_embd, n_inner, bias=False)
        self.up = nn.Linear(n_embd, n_inner, bias=False)
        self.down = nn.Linear(n_inner, n_embd, bias=False)

    def forward(self, x):
        """Let one half gate the other: (B, T, C) -> (B, T, n_inner), twice -> (B, T, C)."""
        raise NotImplementedError("write SwiGLU.forward")
