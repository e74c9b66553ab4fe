"""A GPT in miniature (rung "LayerNorm"), written from memory two days after watching."""
import math
import torch
import torch.nn as nn
import torch.nn.functional as F

context_length = 8
channels = 32
heads = 4
depth = 3


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.o = nn.Linear(channels, channels)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, heads, -1).transpose(1, 2)
        k = self.k(x).view(B, T, heads, -1).transpose(1, 2)
        v = self.v(x).view(B, T, heads, -1).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / math.sqrt(channels // heads)
        # rows: who asks, columns: who answers
        not_yet = torch.ones(T, T).triu(1) == 1
        weights = scores.masked_fill(not_yet, float("-inf")).softmax(dim=3)
        return self.o((weights @ v).transpose(1, 2).reshape(B, T, channels))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_a = nn.LayerNorm(channels)
        self.attention = Attention()
        self.norm_b = nn.LayerNorm(channels)
        self.think = nn.Sequential(nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        x = x + self.attention(self.norm_a(x))
        x = x + self.think(self.norm_b(x))
        return x


class MiniGPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.what = nn.Embedding(vocab_size, channels)
        self.where = nn.Embedding(context_length, channels)
        block = Block()
        self.blocks = nn.Sequential(*[block for _ in range(depth)])
        self.norm = nn.LayerNorm(channels)
        self.guess = nn.Linear(channels, vocab_size)

    def forward(self, tokens, targets=None):
        x = self.what(tokens) + self.where(torch.arange(tokens.shape[1]))
        logits = self.guess(self.norm(self.blocks(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
