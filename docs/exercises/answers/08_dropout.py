"""The answer of an exercise; docs/starters.py makes exercises/08_dropout.py from it."""
# exercise: dropout

import torch
import torch.nn as nn


class Dropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p  # the probability with which a value becomes 0

    def forward(self, x):
        """In training, set values to 0 at random and divide the others by 1 - p; afterwards, return x as it is."""
        if not self.training:
            return x
        kept = (torch.rand_like(x) >= self.p).to(x.dtype)
        return x * kept / (1 - self.p)
