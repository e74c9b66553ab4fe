"""The answer of an exercise; docs/starters.py makes exercises/01_bigram.py from it."""
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
        logits = self.token_embedding_table(idx)  # (B, T) -> (B, T, V)
        if targets is None:
            return logits, None
        B, T, V = logits.shape
        return logits, F.cross_entropy(logits.view(B * T, V), targets.view(B * T))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Return idx (B, T) with sampled tokens after it: (B, T + max_new_tokens)."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx)
            p = F.softmax(logits[:, -1, :], dim=-1)  # (B, V): the last position predicts the next token
            idx = torch.cat((idx, torch.multinomial(p, num_samples=1)), dim=1)  # (B, T + 1)
        return idx
