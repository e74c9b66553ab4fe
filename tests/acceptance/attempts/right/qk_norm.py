# Rung 11 of my notes: QK-norm on top of rope + rmsnorm + swiglu
import math
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class Args:
    vocab_size: int = 65
    dim: int = 128
    heads: int = 4
    layers: int = 4
    ctx: int = 64
    rope_base: float = 10_000.0


class QKNormAttention(nn.Module):
    def __init__(self, a: Args):
        super().__init__()
        self.H = a.heads
        self.hd = a.dim // a.heads
        self.qkv = nn.Linear(a.dim, 3 * a.dim, bias=False)
        self.out = nn.Linear(a.dim, a.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.hd)
        self.k_norm = nn.RMSNorm(self.hd)
        inv_freq = 1.0 / (a.rope_base ** (torch.arange(0, self.hd, 2).float() / self.hd))
        ang = torch.outer(torch.arange(a.ctx).float(), inv_freq)
        ang = torch.cat([ang, ang], dim=-1)
        self.register_buffer("cos", ang.cos(), persistent=False)
        self.register_buffer("sin", ang.sin(), persistent=False)
        self.register_buffer("hide", torch.ones(a.ctx, a.ctx, dtype=torch.bool).triu(1), persistent=False)

    def rope(self, x):
        T = x.size(2)
        x1, x2 = x[..., : self.hd // 2], x[..., self.hd // 2 :]
        return x * self.cos[:T] + torch.cat([-x2, x1], dim=-1) * self.sin[:T]

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, self.hd).permute(2, 0, 3, 1, 4)
        q = self.rope(self.q_norm(q))  # norm first, then rotate
        k = self.rope(self.k_norm(k))
        s = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.hd)
        s = s.masked_fill(self.hide[:T, :T], float("-inf"))
        y = torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v).reshape(B, T, C)
        return self.out(y)


class GatedMLP(nn.Module):
    def __init__(self, a: Args):
        super().__init__()
        hidden = 64 * math.ceil(a.dim * 8 / 3 / 64)
        self.gate_up = nn.Linear(a.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, a.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, a: Args):
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(a.dim), nn.RMSNorm(a.dim)
        self.attn, self.mlp = QKNormAttention(a), GatedMLP(a)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        x = x + self.mlp(self.n2(x))
        return x


class Model(nn.Module):
    def __init__(self, a: Args):
        super().__init__()
        self.embed = nn.Embedding(a.vocab_size, a.dim)
        self.layers = nn.Sequential(*[Layer(a) for _ in range(a.layers)])
        self.norm = nn.RMSNorm(a.dim)
        self.head = nn.Linear(a.dim, a.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids, labels=None):
        logits = self.head(self.norm(self.layers(self.embed(ids))))
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())
