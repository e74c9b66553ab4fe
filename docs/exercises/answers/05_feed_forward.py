"""The answer of an exercise; docs/starters.py makes exercises/05_feed_forward.py from it."""
# exercise: feed-forward

import torch.nn as nn


class FeedForward(nn.Module):
    def __init__(self, n_embd):
        """Make a linear layer from n_embd to n_embd channels, and a ReLU."""
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_embd, n_embd), nn.ReLU())

    def forward(self, x):
        """Compute on each position alone: (B, T, C) -> (B, T, C)."""
        return self.net(x)
