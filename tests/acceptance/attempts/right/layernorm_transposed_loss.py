import torch, torch.nn as nn, torch.nn.functional as F

B_, T_, D, H, L = 32, 8, 32, 4, 3     # batch, time, width, heads, layers

raw = open('input.txt').read()
alphabet = ''.join(sorted(set(raw)))
V = len(alphabet)
ids = torch.tensor([alphabet.index(c) for c in raw])
cut = len(ids) * 9 // 10

def sample(part):
    i = torch.randint(len(part) - T_, (B_,))
    chunk = torch.stack([part[j:j + T_ + 1] for j in i])
    return chunk[:, :-1], chunk[:, 1:]

class Attn(nn.Module):
    def __init__(s):
        super().__init__()
        s.q, s.k, s.v, s.o = [nn.Linear(D, D, bias=False) for _ in range(4)]
    def forward(s, x):
        b, t, _ = x.shape
        # (b, t, D) -> (b, H, t, D/H)
        q, k, v = [f(x).view(b, t, H, D // H).transpose(1, 2) for f in (s.q, s.k, s.v)]
        a = q @ k.transpose(2, 3) * (D // H) ** -.5
        a = a + torch.full((t, t), float('-inf')).triu(1)
        return s.o((a.softmax(3) @ v).transpose(1, 2).reshape(b, t, D))

class Layer(nn.Module):
    def __init__(s):
        super().__init__()
        s.n1, s.n2, s.attn = nn.LayerNorm(D), nn.LayerNorm(D), Attn()
        s.ff = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))
    def forward(s, x):
        x = x + s.attn(s.n1(x))
        return x + s.ff(s.n2(x))

class Net(nn.Module):
    def __init__(s):
        super().__init__()
        s.te, s.pe = nn.Embedding(V, D), nn.Embedding(T_, D)
        s.layers = nn.Sequential(*(Layer() for _ in range(L)))
        s.norm, s.head = nn.LayerNorm(D), nn.Linear(D, V)
    def forward(s, idx, targets=None):
        x = s.te(idx) + s.pe(torch.arange(idx.shape[1]))
        logits = s.head(s.norm(s.layers(x)))
        if targets is None: return logits, None
        # cross_entropy wants the classes in dim 1: (b, V, t)
        return logits, F.cross_entropy(logits.transpose(1, 2), targets)

net = Net()
opt = torch.optim.AdamW(net.parameters(), 1e-3)
iters = 5000
for i in range(iters):
    loss = net(*sample(ids[:cut]))[1]
    opt.zero_grad(); loss.backward(); opt.step()
    if i % 500 == 0:
        net.eval()
        with torch.no_grad(): print(i, loss.item(), net(*sample(ids[cut:]))[1].item())
        net.train()

out = torch.zeros(1, 1, dtype=torch.long)
for _ in range(300):
    with torch.no_grad():
        p = net(out[:, -T_:])[0][:, -1].softmax(-1)
    out = torch.cat((out, p.multinomial(1)), 1)
print(''.join(alphabet[i] for i in out[0]))
