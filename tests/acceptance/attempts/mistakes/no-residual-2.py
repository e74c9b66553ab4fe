from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:
    dim: int = 128
    n_heads: int = 4
    max_len: int = 64


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return self.g * x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hidden = 8 * dim // 3
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class RotaryAttention(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.n_heads = args.n_heads
        self.qkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.out = nn.Linear(args.dim, args.dim, bias=False)
        half = args.dim // args.n_heads // 2
        freq = 10000.0 ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(args.max_len), freq)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotate(self, t):
        n = t.shape[-2]
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * self.cos[:n] - b * self.sin[:n], b * self.cos[:n] + a * self.sin[:n]), dim=-1)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """one layer, bias-free like in llama"""

    def __init__(self, args: Args):
        super().__init__()
        self.norm_1 = RMSNorm(args.dim)
        self.attn = RotaryAttention(args)
        self.norm_2 = RMSNorm(args.dim)
        self.mlp = SwiGLU(args.dim)

    def forward(self, x):
        x = self.attn(self.norm_1(x))
        x = x + self.mlp(self.norm_2(x))
        return x
