"""Feed-forward. A layer that computes on each position alone.

Write FeedForward.__init__ and FeedForward.forward. Then run, in the folder above this file:

    bardlet check exercises/05_feed_forward.py  # with --hint: a hint

Explained in the lecture at 1:24:25, and in docs/rungs/05-feed-forward.md.
"""
# exercise: feed-forward

import torch.nn as nn


class FeedForward(nn.Module):
    def __init__(self, n_embd):
        """Make a linear layer from n_embd to n_embd channels, and a ReLU."""
        super().__init__()
        raise NotImplementedError("write FeedForward.__init__")

    def forward(self, x):
        """Compute on each position alone: (B, T, C) -> (B, T, C)."""
        raise NotImplementedError("write FeedForward.forward")
