"""Dropout. Training sets random values to 0; evaluation does not.

Write Dropout.forward. Then run, in the folder above this file:

    bardlet check exercises/08_dropout.py  # with --hint: a hint

Explained in the lecture at 1:37:49, and in docs/rungs/08-dropout.md.
"""
# exercise: dropout

import torch
import torch.nn as nn


class Dropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p  # the probability with which a value becomes 0

    def forward(self, x):
        """In training, set values to 0 at random and divide the others by 1 - p; afterwards, return x as it is."""
        raise NotImplementedError("write Dropout.forward")
