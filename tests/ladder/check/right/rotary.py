# Rotary positions, grouped in one tensor, a swish gate.
import torch
import torch.nn as nn
import torch.nn.functional as F


class Config:
    dim = 512
    n_heads = 8
    n_layers = 6
    max_seq_len = 256
    vocab_size = 65


def rotate(x):
    B, H, T, D = x.shape
    angle = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.wqkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(2, 3) / (q.shape[-1] ** 0.5)
        scores = scores + torch.triu(torch.full((T, T), float("-inf")), 1)
        return self.wo((F.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, T, C))


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1, self.w3 = nn.Linear(config.dim, 4 * config.dim), nn.Linear(config.dim, 4 * config.dim)
        self.w2 = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.a, self.f = Attention(config), Gate(config)
        self.na, self.nf = RMSNorm(config.dim), RMSNorm(config.dim)

    def forward(self, x):
        x = x + self.a(self.na(x))
        return x + self.f(self.nf(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        return {"logits": logits, "loss": loss}

    def generate(self, input_ids, max_new_tokens=20):
        for _ in range(max_new_tokens):
            probs = self(input_ids[:, -256:])["logits"][:, -1].softmax(-1)
            input_ids = torch.cat((input_ids, torch.multinomial(probs, 1)), -1)
        return input_ids
