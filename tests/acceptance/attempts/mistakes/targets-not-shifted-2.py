import torch, math
import torch.nn as nn, torch.nn.functional as F

class Attn(nn.Module):
    def __init__(self, d, h, n):
        super().__init__()
        self.h = h
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.register_buffer('m', torch.tril(torch.ones(n, n)))
    def forward(self, x):
        b, t, d = x.shape
        q, k, v = [f(x).reshape(b, t, self.h, d // self.h).transpose(1, 2) for f in (self.q, self.k, self.v)]
        s = q @ k.transpose(2, 3) / math.sqrt(d // self.h)
        s = s.masked_fill(self.m[:t, :t] == 0, -math.inf).softmax(-1)
        return self.o((s @ v).transpose(1, 2).reshape(b, t, d))

class Block(nn.Module):
    def __init__(self, d, h, n):
        super().__init__()
        self.a, self.f = Attn(d, h, n), nn.Sequential(nn.Linear(d, 4*d), nn.ReLU(), nn.Linear(4*d, d))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
    def forward(self, x):
        x = x + self.a(self.n1(x))
        return x + self.f(self.n2(x))

class LM(nn.Module):
    def __init__(self, vocab, n=8, d=32, h=4, layers=3):
        super().__init__()
        self.n = n
        self.te, self.pe = nn.Embedding(vocab, d), nn.Embedding(n, d)
        self.blocks = nn.Sequential(*[Block(d, h, n) for _ in range(layers)])
        self.ln, self.out = nn.LayerNorm(d), nn.Linear(d, vocab)
    def forward(self, ids):
        """returns logits and the language modeling loss, like the huggingface models do with labels=input_ids"""
        x = self.te(ids) + self.pe(torch.arange(ids.size(1), device=ids.device))
        logits = self.out(self.ln(self.blocks(x)))
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return logits, loss
    @torch.no_grad()
    def generate(self, ids, k):
        for _ in range(k):
            logits, _ = self(ids[:, -self.n:])
            ids = torch.cat([ids, logits[:, -1].softmax(-1).multinomial(1)], 1)
        return ids

if __name__ == '__main__':
    text = open('input.txt').read()
    v = sorted(set(text)); data = torch.tensor([v.index(c) for c in text[:100000]])
    lm = LM(len(v)); opt = torch.optim.AdamW(lm.parameters(), 1e-3)
    for i in range(5000):
        j = torch.randint(len(data) - lm.n, (32, 1)) + torch.arange(lm.n)
        loss = lm(data[j])[1]
        opt.zero_grad(); loss.backward(); opt.step()
        if i % 500 == 0: print(i, loss.item())
    print(''.join(v[c] for c in lm.generate(torch.zeros(1, 1, dtype=torch.long), 200)[0]))
