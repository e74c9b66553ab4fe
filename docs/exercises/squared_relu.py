"""A feature from a paper as a rung: the squared ReLU of *Primer* (So et al. 2021, section 4). One change to rung 9.

To add it to the ladder, append the three classes to src/bardlet/models/lecture.py; docs/exercises/paper.md lists the
other steps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.models.base import LectureModel
from bardlet.models.layers import RMSNorm, init_weights
from bardlet.models.lecture import RotaryAttention

# ============================================================================ 14: squared ReLU


class SquaredFeedForward(nn.Module):
    """The feed-forward layer of rung 9 with a squared ReLU: large activations become larger."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x)).square()  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.down(x))  # (B, T, 4C) -> (B, T, C)


class SquaredBlock(nn.Module):
    """The block of rung 9 with the new feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.n_embd, config.norm_eps)
        self.sa = RotaryAttention(config)
        self.ln2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffwd = SquaredFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class SquaredModel(LectureModel):
    """The model of rung 9 with the new block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SquaredBlock(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("proj", "down"), n_layer=config.n_layer)

    def logits(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx)  # (B, T) -> (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, C) -> (B, T, V)
