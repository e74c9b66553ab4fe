import torch, torch.nn as nn
from torch.nn import functional as F
class SelfAttentionHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(32, 8, bias=False); self.query = nn.Linear(32, 8, bias=False); self.value = nn.Linear(32, 8, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(8, 8)))
    def forward(self, x):
        b, t, c = x.shape
        a = self.query(x) @ self.key(x).mT / 8 ** .5
        a = a.masked_fill(~self.tril[:t, :t].bool(), float("-inf"))
        return torch.softmax(a, -1) @ self.value(x)
class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(65, 32); self.pos = nn.Embedding(8, 32)
        self.heads = nn.ModuleList([SelfAttentionHead() for _ in range(4)])
        self.ff = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32))
        self.out = nn.Linear(32, 65)
    def forward(self, idx, targets):
        x = self.emb(idx) + self.pos(torch.arange(idx.shape[1]))
        x = torch.cat([h(x) for h in self.heads], dim=-1)
        x = self.ff(x)
        logits = self.out(x)
        loss = F.cross_entropy(logits.reshape(-1, 65), targets.reshape(-1))
        return logits, loss
