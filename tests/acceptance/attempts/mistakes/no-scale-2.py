from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class ModelArgs:
    n_embd: int = 128
    n_head: int = 4
    block_size: int = 64
    dropout: float = 0.1


class CausalSelfAttention(nn.Module):
    """Attention over all heads in parallel."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_head = args.n_head
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)
        self.attn_dropout = nn.Dropout(args.dropout)
        self.register_buffer("mask", torch.ones(args.block_size, args.block_size).triu(1).bool())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        att = torch.einsum("bhqd,bhkd->bhqk", q, k)
        att = att.masked_fill(self.mask[:T, :T], float("-inf"))
        att = self.attn_dropout(att.softmax(dim=-1))
        y = torch.einsum("bhqk,bhkd->bqhd", att, v)
        return self.c_proj(y.reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd)
        self.attn = CausalSelfAttention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(args.n_embd, 4 * args.n_embd),
            nn.GELU(),
            nn.Linear(4 * args.n_embd, args.n_embd),
            nn.Dropout(args.dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x
