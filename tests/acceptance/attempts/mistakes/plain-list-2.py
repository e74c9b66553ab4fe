from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Hyper:
    vocab: int = 65
    ctx_len: int = 64
    d_model: int = 128
    num_heads: int = 4
    num_layers: int = 4
    dropout: float = 0.1


class Attention(nn.Module):
    def __init__(self, h: Hyper) -> None:
        super().__init__()
        self.h = h
        self.wqkv = nn.Linear(h.d_model, 3 * h.d_model, bias=False)
        self.wo = nn.Linear(h.d_model, h.d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.wqkv(x).view(B, T, 3, self.h.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = self.h.dropout if self.training else 0.0
        return self.wo(F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, h: Hyper) -> None:
        super().__init__()
        self.ln_attn = nn.LayerNorm(h.d_model)
        self.attn = Attention(h)
        self.ln_mlp = nn.LayerNorm(h.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(h.d_model, 4 * h.d_model),
            nn.GELU(),
            nn.Linear(4 * h.d_model, h.d_model),
            nn.Dropout(h.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_attn(x))
        return x + self.mlp(self.ln_mlp(x))


class Transformer(nn.Module):
    def __init__(self, h: Hyper) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(h.vocab, h.d_model)
        self.pos_emb = nn.Embedding(h.ctx_len, h.d_model)
        self.blocks = []
        for _ in range(h.num_layers):
            self.blocks.append(TransformerBlock(h))
        self.ln_f = nn.LayerNorm(h.d_model)
        self.lm_head = nn.Linear(h.d_model, h.vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.transpose(1, 2), targets)
