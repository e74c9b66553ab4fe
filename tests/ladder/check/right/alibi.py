import torch, torch.nn as nn, torch.nn.functional as F
class Attn(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False); self.o = nn.Linear(n_embd, n_embd, bias=False)
        pos = torch.arange(block_size)
        bias = -(pos[:, None] - pos[None]).clamp(min=0).float()
        slopes = 2.0 ** -torch.arange(1, n_head + 1)
        self.register_buffer("bias", bias[None] * slopes[:, None, None])
    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.reshape(B, T, self.n_head, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        m = torch.triu(torch.full((T, T), float("-inf")), 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None, :, :T, :T] + m)
        return self.o(y.permute(0, 2, 1, 3).reshape(B, T, C))
class Block(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.a = Attn(n_embd, n_head, block_size); self.m = nn.Sequential(nn.Linear(n_embd, 4*n_embd), nn.SiLU(), nn.Linear(4*n_embd, n_embd))
        self.n1 = nn.LayerNorm(n_embd); self.n2 = nn.LayerNorm(n_embd)
    def forward(self, x):
        x = x + self.a(self.n1(x))
        x = x + self.m(self.n2(x))
        return x
class GPT(nn.Module):
    def __init__(self, vocab_size=65, n_embd=128, n_head=4, n_layer=4, block_size=128):
        super().__init__()
        self.block_size = block_size
        self.e = nn.Embedding(vocab_size, n_embd)
        self.b = nn.Sequential(*[Block(n_embd, n_head, block_size) for _ in range(n_layer)])
        self.n = nn.LayerNorm(n_embd); self.h = nn.Linear(n_embd, vocab_size, bias=False)
        self.h.weight = self.e.weight
        nn.init.normal_(self.e.weight, std=0.02)
    def forward(self, idx, targets=None):
        logits = self.h(self.n(self.b(self.e(idx))))
        if targets is None: return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
    def generate(self, prompt, max_new_tokens, temperature=1.0, top_p=0.9):
        idx = torch.tensor([encode(prompt)])
        for _ in range(max_new_tokens):
            probs = torch.softmax(self(idx[:, -self.block_size:])[:, -1] / temperature, -1)
            idx = torch.cat([idx, torch.multinomial(probs, 1)], 1)
        return decode(idx[0].tolist())
def encode(s): return [stoi[c] for c in s]
def decode(l): return "".join(itos[i] for i in l)
