# Bigram baseline. Goal: understand the shapes before doing any attention.
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(42)
block_size = 8
batch_size = 4

text = open("input.txt").read()
chars = sorted(set(text))
vocab_size = len(chars)
char_to_id = dict(zip(chars, range(vocab_size)))
id_to_char = dict(enumerate(chars))

data = torch.tensor([char_to_id[c] for c in text])
split = int(len(data) * 0.9)
train, val = data[:split], data[split:]


def get_batch(which):
    d = train if which == "train" else val
    starts = torch.randint(0, len(d) - block_size - 1, (batch_size,))
    x = torch.stack([d[s : s + block_size] for s in starts])
    y = torch.stack([d[s + 1 : s + 1 + block_size] for s in starts])
    return x, y


class BigramLanguageModel(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        # row i = scores for whatever follows character i
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None):
        logits = self.token_embedding_table(idx)
        if targets is None:
            return logits, None
        B, T, C = logits.shape
        loss = F.cross_entropy(logits.view(B * T, C), targets.view(B * T))
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx)
            p = F.softmax(logits[:, -1], dim=1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)
        return idx


m = BigramLanguageModel(vocab_size)
opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
batch_size = 32
for step in range(3000):
    xb, yb = get_batch("train")
    _, loss = m(xb, yb)
    opt.zero_grad()
    loss.backward()
    opt.step()
print("final:", loss.item())

out = m.generate(torch.zeros((1, 1), dtype=torch.long), 300)
print("".join(id_to_char[i] for i in out[0].tolist()))
