import torch, torch.nn as nn, torch.nn.functional as F
class Attention(nn.Module):
    def __init__(self, d_model, n_heads, causal=False):
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.q = nn.Linear(d_model, d_model); self.k = nn.Linear(d_model, d_model); self.v = nn.Linear(d_model, d_model); self.o = nn.Linear(d_model, d_model)
    def forward(self, x, context=None):
        context = x if context is None else context
        split = lambda t: t.view(t.size(0), t.size(1), self.n_heads, -1).transpose(1, 2)
        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        s = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        if self.causal:
            s = s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, float("-inf"))
        return self.o((s.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
class EncoderBlock(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.sa = Attention(d_model, n_heads); self.ff = nn.Sequential(nn.Linear(d_model, 4*d_model), nn.ReLU(), nn.Linear(4*d_model, d_model)); self.n1 = nn.LayerNorm(d_model); self.n2 = nn.LayerNorm(d_model)
    def forward(self, x):
        x = self.n1(x + self.sa(x))
        return self.n2(x + self.ff(x))
class DecoderBlock(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.sa = Attention(d_model, n_heads, causal=True); self.ca = Attention(d_model, n_heads)
        self.ff = nn.Sequential(nn.Linear(d_model, 4*d_model), nn.ReLU(), nn.Linear(4*d_model, d_model)); self.n1, self.n2, self.n3 = (nn.LayerNorm(d_model) for _ in range(3))
    def forward(self, x, enc):
        x = x + self.sa(self.n1(x)); x = x + self.ca(self.n2(x), enc)
        return x + self.ff(self.n3(x))
class Seq2Seq(nn.Module):
    def __init__(self, src_vocab_size, tgt_vocab_size, d_model=64, n_heads=4, n_layers=2):
        super().__init__()
        self.es, self.et = nn.Embedding(src_vocab_size, d_model), nn.Embedding(tgt_vocab_size, d_model)
        self.enc = nn.ModuleList([EncoderBlock(d_model, n_heads) for _ in range(n_layers)]); self.dec = nn.ModuleList([DecoderBlock(d_model, n_heads) for _ in range(n_layers)])
        self.out = nn.Linear(d_model, tgt_vocab_size)
    def forward(self, src, tgt):
        m = self.es(src); x = self.et(tgt)
        for b in self.enc: m = b(m)
        for b in self.dec: x = b(x, m)
        return self.out(x)
