# The softmax written out, as in the lectures before this one: exponentials, counts, probabilities.
import torch
import torch.nn as nn
import torch.nn.functional as F

block_size = 128
n_embd = 96
n_head = 4
n_layer = 3


def probabilities(logits, dim):
    counts = (logits - logits.amax(dim, keepdim=True)).exp()
    return counts / counts.sum(dim, keepdim=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd)
        self.register_buffer("past", torch.ones(block_size, block_size).tril().bool())

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (each.view(B, T, n_head, -1).transpose(1, 2) for each in self.qkv(x).split(n_embd, dim=2))
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        scores[:, :, ~self.past[:T, :T]] = float("-inf")
        return self.out((probabilities(scores, -1) @ v).transpose(1, 2).reshape(B, T, C))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.layers = nn.Sequential(*[Layer() for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        logits = self.head(self.norm(self.layers(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.transpose(1, 2), targets)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -block_size:])
            idx = torch.cat([idx, torch.multinomial(probabilities(logits[:, -1], -1), 1)], dim=1)
        return idx
