"""The bigram. A table whose row of a token holds the logits of the next one.

Write BigramLanguageModel.forward and BigramLanguageModel.generate. Then run, in the folder above this file:

    bardlet check exercises/01_bigram.py  # with --hint: a hint

Explained in the lecture at 0:22:11, and in docs/rungs/01-bigram.md.
"""
# exercise: bigram

import torch
import torch.nn as nn
from torch.nn import functional as F


class BigramLanguageModel(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)  # a row holds the logits of the next token

    def forward(self, idx, targets=None):
        """Return the logits (B, T, V), and the mean cross-entropy; None for the loss without targets.

        idx: (B, T), tokens. targets: (B, T), the token after each of them.
        """
        raise NotImplementedError("write BigramLanguageModel.forward")

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Return idx (B, T) with sampled tokens after it: (B, T + max_new_tokens)."""
        raise NotImplementedError("write BigramLanguageModel.generate")
