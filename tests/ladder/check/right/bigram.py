# The first half of the lecture, as a notebook exported to Python.
# In[1]:
get_ipython().system("wget https://example.org/input.txt")
with open("input.txt") as f:
    text = f.read()

# In[2]:
import torch
import torch.nn as nn
from torch.nn import functional as F

torch.manual_seed(1337)
chars = sorted(list(set(text)))
vocab_size = len(chars)
data = torch.tensor([chars.index(c) for c in text])
block_size = 8


class BigramLanguageModel(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None):
        logits = self.token_embedding_table(idx)
        if targets is None:
            loss = None
        else:
            B, T, C = logits.shape
            logits = logits.view(B * T, C)
            loss = F.cross_entropy(logits, targets.view(B * T))
        return logits, loss

    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, loss = self(idx)
            probs = F.softmax(logits[:, -1, :], dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
        return idx


# In[3]:
m = BigramLanguageModel(vocab_size)
optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
for steps in range(100):
    starts = torch.randint(len(data) - block_size, (32,))
    xb = torch.stack([data[i:i + block_size] for i in starts])
    yb = torch.stack([data[i + 1:i + block_size + 1] for i in starts])
    logits, loss = m(xb, yb)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
print(m.generate(idx=torch.zeros((1, 1), dtype=torch.long), max_new_tokens=500)[0].tolist())
