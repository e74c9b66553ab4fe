# manual softmax, embeddings class, torch.cat positions, functions
import math, torch, torch.nn as nn, torch.nn.functional as F
from types import SimpleNamespace
config = SimpleNamespace(n_embd=64, n_head=4, n_layer=2, block_size=32, dropout=0.1, vocab_size=65)
def attention(q, k, v, mask=None, dropout=None):
    d_k = q.size(-1)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p = F.softmax(scores, dim=-1)
    if dropout is not None: p = dropout(p)
    return torch.matmul(p, v), p
class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tok = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos = nn.Embedding(config.block_size, config.n_embd)
    def forward(self, idx):
        return self.tok(idx) + self.pos(torch.arange(idx.size(1)))[None]
class MHA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lin = nn.ModuleList([nn.Linear(config.n_embd, config.n_embd) for _ in range(4)])
        self.h = config.n_head; self.drop = nn.Dropout(config.dropout)
    def forward(self, q, k, v, mask=None):
        n, T = q.size(0), q.size(1)
        q, k, v = [l(x).view(n, -1, self.h, x.size(-1) // self.h).transpose(1, 2) for l, x in zip(self.lin, (q, k, v))]
        x, self.attn = attention(q, k, v, mask, self.drop)
        return self.lin[-1](x.transpose(1, 2).contiguous().view(n, T, -1))
class FFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, 4 * config.n_embd); self.w2 = nn.Linear(4 * config.n_embd, config.n_embd)
    def forward(self, x): return self.w2(F.relu(self.w1(x)))
class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = MHA(config); self.ffn = FFN(config)
        self.n1 = nn.LayerNorm(config.n_embd); self.n2 = nn.LayerNorm(config.n_embd)
    def forward(self, x, mask):
        y = self.n1(x)
        x = x + self.attn(y, y, y, mask)
        return x + self.ffn(self.n2(x))
class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.emb = Embeddings(config)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd); self.proj = nn.Linear(config.n_embd, config.vocab_size)
    def forward(self, idx, targets=None):
        mask = torch.tril(torch.ones(idx.size(1), idx.size(1)))[None, None]
        x = self.emb(idx)
        for l in self.layers: x = l(x, mask)
        logits = self.proj(self.norm(x))
        loss = F.cross_entropy(logits.transpose(1, 2), targets) if targets is not None else None
        return logits, loss
