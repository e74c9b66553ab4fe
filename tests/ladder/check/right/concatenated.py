import torch
import torch.nn as nn
import torch.nn.functional as F
torch.manual_seed(0)
B, T = 4, 8
block_size = 8
n_embed = 32
text = open('input.txt').read()
chars = sorted(set(text)); vocab_size = len(chars)
class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embed, head_size, bias=False)
        self.query = nn.Linear(n_embed, head_size, bias=False)
        self.value = nn.Linear(n_embed, head_size, bias=False)
        self.register_buffer('tril', torch.tril(torch.ones(block_size, block_size)))
    def forward(self, x):
        B, T, C = x.shape
        k, q, v = self.key(x), self.query(x), self.value(x)
        w = (q @ k.transpose(1, 2)) / (k.size(2) ** 0.5)
        w = w.masked_fill(self.tril[:T, :T] == 0, -float('inf')).softmax(2)
        return w @ v
class MultiHead(nn.Module):
    def __init__(self, n, hs):
        super().__init__()
        self.heads = nn.ModuleList(Head(hs) for _ in range(n))
    def forward(self, x):
        return torch.cat([h(x) for h in self.heads], -1)
class BigramLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, n_embed)
        self.pos = nn.Embedding(block_size, n_embed)
        self.sa = MultiHead(4, n_embed // 4)
        self.lm_head = nn.Linear(n_embed, vocab_size)
    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.tok(idx) + self.pos(torch.arange(T))
        x = self.sa(x)
        logits = self.lm_head(x)
        if targets is None: return logits, None
        return logits, F.cross_entropy(logits.permute(0, 2, 1), targets)
    def generate(self, idx, n):
        for _ in range(n):
            logits, _ = self(idx[:, -block_size:])
            p = logits[:, -1].softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        return idx
