"""The answer of an exercise; docs/starters.py makes exercises/d_paper.py from it."""
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
        return self.down(F.relu(self.up(x)).square())
