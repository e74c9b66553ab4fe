import torch
from torch import nn


class MHA(nn.Module):
    def __init__(self, dim, n_heads, max_len, dropout):
        super().__init__()
        assert dim % n_heads == 0
        self.n_heads = n_heads
        self.scale = (dim // n_heads) ** -0.5
        self.Wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.Wo = nn.Linear(dim, dim, bias=False)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("causal", torch.tril(torch.ones(max_len, max_len, dtype=torch.bool)), persistent=False)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.Wqkv(x).view(b, n, 3, self.n_heads, -1).unbind(2)
        logits = torch.einsum("bihd,bjhd->bhij", q * self.scale, k)
        logits = logits.masked_fill(~self.causal[:n, :n], torch.finfo(logits.dtype).min)
        att = self.drop(logits.softmax(-1))
        return self.Wo(torch.einsum("bhij,bjhd->bihd", att, v).reshape(b, n, d))


class Layer(nn.Module):
    def __init__(self, dim, n_heads, max_len, dropout):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = MHA(dim, n_heads, max_len, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU(), nn.Linear(dim * 4, dim), nn.Dropout(dropout))

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LanguageModel(nn.Module):
    def __init__(self, vocab_size, dim=128, n_heads=4, n_layers=4, max_len=64, dropout=0.1):
        super().__init__()
        self.max_len = max_len
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList([Layer(dim, n_heads, max_len, dropout) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(dim)
        self.unembed = nn.Linear(dim, vocab_size)

    def forward(self, ids, targets=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.unembed(self.norm(x))
        if targets is None:
            return logits
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
