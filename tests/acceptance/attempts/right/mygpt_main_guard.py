import argparse
import random

import torch
import torch.nn as nn
import torch.nn.functional as F


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, num_heads, ctx_len, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.attn_drop = nn.Dropout(dropout)
        self.proj_drop = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(ctx_len, ctx_len)).view(1, 1, ctx_len, ctx_len))

    def forward(self, x):
        B, T, C = x.shape
        head_dim = C // self.num_heads
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        # split heads
        q = q.view(B, T, self.num_heads, head_dim).permute(0, 2, 1, 3)
        k = k.view(B, T, self.num_heads, head_dim).permute(0, 2, 1, 3)
        v = v.view(B, T, self.num_heads, head_dim).permute(0, 2, 1, 3)
        att = (q @ k.transpose(-2, -1)) * head_dim ** -0.5
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, torch.finfo(att.dtype).min)
        att = self.attn_drop(att.softmax(dim=-1))
        y = (att @ v).permute(0, 2, 1, 3).reshape(B, T, C)
        return self.proj_drop(self.proj(y))


class TransformerBlock(nn.Module):
    def __init__(self, d_model, num_heads, ctx_len, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model)
        self.attn = MultiHeadAttention(d_model, num_heads, ctx_len, dropout)
        self.ln_2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model), nn.Dropout(dropout)
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class MyGPT(nn.Module):
    def __init__(self, vocab_size, d_model=128, num_heads=4, num_layers=4, ctx_len=64, dropout=0.1):
        super().__init__()
        self.ctx_len = ctx_len
        self.tok_emb = nn.Embedding(vocab_size, d_model)
        self.pos_emb = nn.Embedding(ctx_len, d_model)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([TransformerBlock(d_model, num_heads, ctx_len, dropout) for _ in range(num_layers)])
        self.ln_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, x, targets=None):
        pos = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        h = self.drop(self.tok_emb(x) + self.pos_emb(pos))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.ln_f(h))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss

    @torch.no_grad()
    def generate(self, x, n):
        self.eval()
        for _ in range(n):
            logits, _ = self(x[:, -self.ctx_len:])
            nxt = torch.multinomial(F.softmax(logits[:, -1], dim=-1), 1)
            x = torch.cat([x, nxt], dim=1)
        return x


def batches(data, ctx_len, batch_size, device):
    while True:
        starts = [random.randrange(len(data) - ctx_len) for _ in range(batch_size)]
        chunk = torch.stack([data[s:s + ctx_len + 1] for s in starts]).to(device)
        yield chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model, batch_iter, n=50):
    model.eval()
    mean = sum(model(*next(batch_iter))[1].item() for _ in range(n)) / n
    model.train()
    return mean


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--file", default="input.txt")
    ap.add_argument("--steps", type=int, default=2000)
    ap.add_argument("--lr", type=float, default=1e-3)
    args = ap.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    with open(args.file, encoding="utf-8") as f:
        text = f.read()
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    data = torch.tensor([stoi[c] for c in text])
    n = int(len(data) * 0.9)

    model = MyGPT(len(chars)).to(device)
    train_iter = batches(data[:n], model.ctx_len, 32, device)
    val_iter = batches(data[n:], model.ctx_len, 32, device)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        x, y = next(train_iter)
        opt.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 200 == 0:
            print(f"{step:5d}  train {loss.item():.3f}  val {evaluate(model, val_iter):.3f}")
    start = torch.zeros((1, 1), dtype=torch.long, device=device)
    print("".join(chars[i] for i in model.generate(start, 300)[0].tolist()))


if __name__ == "__main__":
    main()
