# -*- coding: utf-8 -*-
# gpt.py -- trains on whatever is in input.txt, samples with temperature / top-k
import os, time
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- device: cuda > mps > cpu
if torch.cuda.is_available():
    device = 'cuda'
elif hasattr(torch.backends, 'mps') and torch.backends.mps.is_available():
    device = 'mps'
else:
    device = 'cpu'
print('using', device)

cfg = dict(ctx=64, dim=128, heads=4, depth=4, p=0.1, bs=32, steps=2000, lr=1e-3)

corpus = open('input.txt', encoding='utf8').read()
itos = sorted(set(corpus)); stoi = {c:i for i,c in enumerate(itos)}
ids = torch.tensor([stoi[c] for c in corpus], dtype=torch.long, device=device)
tr, va = ids[:int(.9*len(ids))], ids[int(.9*len(ids)):]

def get_batch(d):
    ix = torch.randint(len(d) - cfg['ctx'] - 1, (cfg['bs'],))
    return (torch.stack([d[i:i+cfg['ctx']] for i in ix]),
            torch.stack([d[i+1:i+1+cfg['ctx']] for i in ix]))

class SelfAttention(nn.Module):
    def __init__(self, dim, heads, p):
        super().__init__()
        self.heads, self.hs = heads, dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        B, T, C = x.shape
        q = self.wq(x).view(B, T, self.heads, self.hs).transpose(1, 2)
        k = self.wk(x).view(B, T, self.heads, self.hs).transpose(1, 2)
        v = self.wv(x).view(B, T, self.heads, self.hs).transpose(1, 2)
        i = torch.arange(T, device=x.device)
        scores = (q / self.hs**0.5) @ k.transpose(-1, -2)
        scores = scores.masked_fill(i[None, :] > i[:, None], float('-inf'))  # key after query -> out
        out = self.drop(scores.softmax(-1)) @ v
        return self.drop(self.wo(out.transpose(1, 2).reshape(B, T, C)))

class Block(nn.Module):
    def __init__(self, dim, heads, p):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim); self.attn = SelfAttention(dim, heads, p)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4*dim), nn.GELU(), nn.Linear(4*dim, dim), nn.Dropout(p))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x

class CharGPT(nn.Module):
    def __init__(self, vocab, ctx, dim, heads, depth, p):
        super().__init__()
        self.ctx = ctx
        self.tok_emb = nn.Embedding(vocab, dim)
        self.pos_emb = nn.Embedding(ctx, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, p) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        for e in (self.tok_emb, self.pos_emb):
            nn.init.normal_(e.weight, std=0.02)
        self.lm_head.weight = self.tok_emb.weight # tied

    def forward(self, idx):
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.size(1), device=idx.device))
        for b in self.blocks: x = b(x)
        return self.lm_head(self.ln_f(x))

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None):
        self.eval()
        for _ in range(n):
            logits = self(idx[:, -self.ctx:])[:, -1, :] / max(temperature, 1e-6)
            if top_k:
                kth = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
                logits = torch.where(logits < kth, torch.full_like(logits, float('-inf')), logits)
            idx = torch.cat([idx, torch.multinomial(F.softmax(logits, -1), 1)], 1)
        self.train()
        return idx

def compute_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

model = CharGPT(len(itos), cfg['ctx'], cfg['dim'], cfg['heads'], cfg['depth'], cfg['p']).to(device)
opt = torch.optim.AdamW(model.parameters(), lr=cfg['lr'], betas=(0.9, 0.95))
t0 = time.time()
for step in range(cfg['steps']):
    loss = compute_loss(model, *get_batch(tr))
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    if step % 250 == 0:
        model.eval()
        with torch.no_grad():
            v = sum(compute_loss(model, *get_batch(va)).item() for _ in range(20)) / 20
        model.train()
        print(f'{step} | train {loss.item():.3f} | val {v:.3f} | {time.time()-t0:.0f}s')

prompt = torch.tensor([[stoi['\n']]], device=device) if '\n' in stoi else torch.zeros(1, 1, dtype=torch.long, device=device)
print(''.join(itos[i] for i in model.generate(prompt, 500, temperature=0.8, top_k=20)[0].tolist()))
