import torch, torch.nn as nn
class Blk(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim); self.ln2 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4*dim), nn.GELU(), nn.Linear(4*dim, dim), nn.Dropout(dropout))
    def forward(self, x):
        T = x.size(1)
        m = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
        y = self.ln1(x)
        y, _ = self.attn(y, y, y, attn_mask=m, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln2(x))
class TinyGPT(nn.Module):
    def __init__(self, vocab, dim=128, heads=4, layers=2, ctx=64, dropout=0.1):
        super().__init__()
        self.ctx = ctx
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Embedding(ctx, dim)
        self.blocks = nn.Sequential(*(Blk(dim, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)
    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.size(1)))
        return self.head(self.norm(self.blocks(x)))
    @torch.no_grad()
    def generate(self, ids, max_new_tokens):
        self.eval()
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids[:, -self.ctx:])[:, -1].argmax(-1, keepdim=True)], 1)
        return ids
def loss_fn(logits, targets):
    return nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
