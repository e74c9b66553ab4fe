"""single head language model on a nursery rhyme, so that it runs on my laptop in seconds"""
import torch, math
import torch.nn as nn, torch.nn.functional as F

TEXT = """
The kettle sings upon the hob,
the cat is on the chair,
the rain is tapping at the glass
and nobody is there.
The kettle stops, the cat awakes,
she stretches toward the light,
and somebody comes up the path
and whispers her good night.
""" * 6

vocab = sorted(set(TEXT))
V = len(vocab)
enc = {c: i for i, c in enumerate(vocab)}
ids = torch.tensor([enc[c] for c in TEXT])
CONTEXT, DIM, BATCH = 16, 32, 32


def batch():
    i = torch.randint(len(ids) - CONTEXT, (BATCH, 1))
    pos = i + torch.arange(CONTEXT)
    return ids[pos], ids[pos + 1]


class Head(nn.Module):
    def __init__(self, dim, head_size):
        super().__init__()
        self.k = nn.Linear(dim, head_size, bias=False)
        self.q = nn.Linear(dim, head_size, bias=False)
        self.v = nn.Linear(dim, head_size, bias=False)

    def forward(self, x):
        T = x.shape[1]
        keep = torch.tril(torch.ones(T, T, device=x.device))   # new one each time, cheap enough
        w = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(self.k.out_features)
        w = w.masked_fill(keep == 0, -1e9)
        return w.softmax(dim=2) @ self.v(x)


class OneHeadLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(V, DIM)
        self.pos = nn.Embedding(CONTEXT, DIM)
        self.sa = Head(DIM, DIM)
        self.out = nn.Linear(DIM, V)

    def forward(self, idx, y=None):
        x = self.tok(idx) + self.pos.weight[: idx.shape[1]]
        logits = self.out(self.sa(x))
        if y is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


torch.manual_seed(0)
net = OneHeadLM()
optim = torch.optim.Adam(net.parameters(), lr=3e-3)
steps = 1000
for s in range(steps):
    x, y = batch()
    logits, loss = net(x, y)
    optim.zero_grad()
    loss.backward()
    optim.step()
    if s % 200 == 0: print(s, loss.item())

ctx = torch.tensor([[enc["T"]]])
with torch.no_grad():
    for _ in range(200):
        logits = net(ctx[:, -CONTEXT:])[:, -1]
        nxt = torch.multinomial(logits.softmax(-1), 1)
        ctx = torch.cat([ctx, nxt], 1)
print("".join(vocab[i] for i in ctx[0]))
