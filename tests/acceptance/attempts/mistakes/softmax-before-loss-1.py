# multi-head self-attention model, trained on Shakespeare
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
block_size, batch_size = 8, 32
n_embd, num_heads = 32, 4

text = open("input.txt", encoding="utf-8").read()
vocab = sorted(set(text))
vocab_size = len(vocab)
to_id = {c: i for i, c in enumerate(vocab)}
data = torch.tensor([to_id[c] for c in text], device=device)
train, val = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]


def get_batch(d):
    ix = torch.randint(len(d) - block_size, (batch_size,))
    return torch.stack([d[i : i + block_size] for i in ix]), torch.stack([d[i + 1 : i + 1 + block_size] for i in ix])


class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        B, T, C = x.shape
        k, q, v = self.key(x), self.query(x), self.value(x)
        att = q @ k.transpose(-2, -1) * k.size(-1) ** -0.5
        att = att.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return att.softmax(dim=-1) @ v


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, n_embd)
        self.pos = nn.Embedding(block_size, n_embd)
        self.heads = nn.ModuleList([Head(n_embd // num_heads) for _ in range(num_heads)])
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.tok(idx) + self.pos(torch.arange(T, device=idx.device))
        x = torch.cat([h(x) for h in self.heads], dim=-1)
        logits = self.lm_head(x)
        loss = None
        if targets is not None:
            probs = F.softmax(logits, dim=-1)
            loss = F.cross_entropy(probs.view(B * T, vocab_size), targets.view(B * T))
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, n):
        for _ in range(n):
            logits, _ = self(idx[:, -block_size:])
            p = F.softmax(logits[:, -1, :], dim=-1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)
        return idx


model = Model().to(device)
opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5000):
    _, loss = model(*get_batch(train))
    opt.zero_grad()
    loss.backward()
    opt.step()
    if step % 500 == 0:
        with torch.no_grad():
            print(step, round(loss.item(), 3), round(model(*get_batch(val))[1].item(), 3))
print("".join(vocab[i] for i in model.generate(torch.zeros(1, 1, dtype=torch.long, device=device), 300)[0].tolist()))
