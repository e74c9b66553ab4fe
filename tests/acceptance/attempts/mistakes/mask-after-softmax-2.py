# qk-norm attention for my modern-GPT experiments
import torch
import torch.nn as nn


def rope(x: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:
    """x: (B, H, T, D)"""
    T, D = x.shape[-2:]
    inv_freq = base ** (-torch.arange(0, D, 2, device=x.device) / D)
    angle = torch.arange(T, device=x.device)[:, None] * inv_freq[None, :]
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class QKNormAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim)
        self.k_norm = nn.RMSNorm(self.head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
        causal = torch.ones(T, T, device=x.device).tril()
        weights = scores.softmax(dim=-1) * causal
        return self.wo((weights @ v).transpose(1, 2).reshape(B, T, C))
