"""Today's GPT: RMSNorm, rotary positions, SwiGLU, QK-norm, the optimizer Muon, and an average of the weights.

    python gpt_modern.py                     # Tiny Shakespeare: input.txt in this folder, downloaded if it is missing
    python gpt_modern.py --large             # the lecture's sizes; they take a GPU
    python gpt_modern.py my.txt dropout=0    # a text of yours, and any of the settings below

This is rung 13 of the course (docs/rungs/13-average.md): the same losses, given the same weights and batches.
"""

import hashlib
import http.client
import math
import sys
import time
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

# ---- settings for a laptop; --large takes the lecture's, in the comments
text = "input.txt"
batch_size = 32  # 64: B, sequences in a batch
block_size = 64  # 256: T, characters in a sequence
n_embd = 128  # 384: C, channels
n_head = 4  # 6: H, heads of attention, each with D = C / H channels
n_layer = 4  # 6: blocks
dropout = 0.1  # 0.2
lr = 1e-3  # 3e-4: learning rate of AdamW, for embedding, head and norms
muon_lr = 1e-2  # of Muon, for the matrices of the blocks
steps = 1500  # 5000
eval_every = 250  # 500
eval_batches = 20  # 200
seed = 1337
device = "cuda" if torch.cuda.is_available() else "cpu"
large = {"batch_size": 64, "block_size": 256, "n_embd": 384, "n_head": 6, "n_layer": 6, "dropout": 0.2,
         "lr": 3e-4, "steps": 5000, "eval_every": 500, "eval_batches": 200}

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---------------------------------------------------------------- the text


def read_text(path):
    """Return a text; input.txt is Tiny Shakespeare, downloaded if it is missing."""
    try:
        if path == "input.txt" and not Path(path).exists():
            with urllib.request.urlopen(URL, timeout=15) as response:
                data = response.read()
            if hashlib.sha256(data).hexdigest() != SHA256:
                raise ValueError("the download is not Tiny Shakespeare")
            Path(path).write_bytes(data)
        return Path(path).read_text(encoding="utf-8")
    except (OSError, http.client.HTTPException, ValueError) as error:
        sys.exit(f"{path}: {error}; name a text file in UTF-8, or save {URL} here as input.txt")


def get_batch(data):
    start = torch.randint(len(data) - block_size, (batch_size, 1))
    position = start + torch.arange(block_size)  # (B, 1) + (T) -> (B, T)
    return data[position].to(device), data[position + 1].to(device)  # the target is the next character


# ---------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """LayerNorm without the mean and the bias: rows of mean square 1, times a weight per channel."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x, cos, sin):
    """Turn each pair of channels (i, i + D/2) by its angle, which grows with the position."""
    left, right = x.chunk(2, dim=-1)  # (B, T, H, D) -> two of (B, T, H, D/2)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Positions enter as rotations, so a score depends on the distance; norms keep queries and keys bounded."""

    def __init__(self):
        super().__init__()
        D = n_embd // n_head
        self.key, self.query = nn.Linear(n_embd, n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.value, self.proj = nn.Linear(n_embd, n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.key_norm, self.query_norm = RMSNorm(D), RMSNorm(D)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)), persistent=False)
        frequency = 1.0 / 10_000.0 ** (torch.arange(0, D, 2).float() / D)  # (D/2), from 1 down to nearly 1 / 10,000
        angle = (torch.arange(block_size)[:, None, None].float() * frequency).repeat(1, 1, 2)  # (T, 1, D)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        v, q, k = (layer(x).view(B, T, n_head, C // n_head) for layer in (self.value, self.query, self.key))
        q = rotate(self.query_norm(q), self.cos[:T], self.sin[:T])  # (B, T, H, D)
        k = rotate(self.key_norm(k), self.cos[:T], self.sin[:T])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))  # no position sees the future
        weight = self.dropout(F.softmax(score, dim=-1))
        out = (weight @ v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, T) @ (B, H, T, D), heads side by side
        return self.dropout(self.proj(out))


class SwiGLU(nn.Module):
    """A feed-forward layer whose one half gates the other; it is narrower, so it costs about the same."""

    def __init__(self):
        super().__init__()
        n_inner = math.ceil(8 * n_embd / 96) * 32  # 8/3 C, a multiple of 32
        self.gate, self.up = nn.Linear(n_embd, n_inner, bias=False), nn.Linear(n_embd, n_inner, bias=False)
        self.down = nn.Linear(n_inner, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = F.silu(self.gate(x)) * self.up(x)  # (B, T, C) -> (B, T, n_inner), twice
        return self.dropout(self.down(x))  # (B, T, n_inner) -> (B, T, C)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1 = RMSNorm(n_embd)
        self.sa = Attention()
        self.ln2 = RMSNorm(n_embd)
        self.ffwd = SwiGLU()

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)  # no table of positions
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.ln_f = RMSNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # small weights; smaller still in layers that add to the residual stream
                adds = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if adds else 0.02)

    def forward(self, idx, targets=None):
        x = self.dropout(self.token_embedding_table(idx))  # (B, T) -> (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B * T, V) and (B * T)

    @torch.no_grad()
    def generate(self, idx, length):
        self.eval()
        for _ in range(length):
            logits, _ = self(idx[:, -block_size:])  # no longer than in training
            p = F.softmax(logits[:, -1], dim=-1)  # (B, V): the last position predicts the new character
            idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)  # (B, T + 1)
        return idx


# ---------------------------------------------------------------- Muon, and the average


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest matrix with orthonormal rows or columns: every direction moves equally far."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        shapes = {}
        for p in group["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for shape, weights in shapes.items():  # all matrices of a shape in one batch, which is faster
            update = orthogonalize(torch.stack([self.smoothed(p, group["momentum"]) for p in weights]))
            for p, u in zip(weights, update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"] * math.sqrt(max(1, shape[0] / shape[1])))

    def smoothed(self, p, momentum):
        m = self.state[p].setdefault("momentum", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - momentum)  # the mean of recent gradients
        return p.grad.lerp(m, momentum)  # Nesterov: the current one counts once more


def orthogonalize(g):
    """Five Newton-Schulz steps take the singular values of each matrix to about 1: (N, R, C) -> (N, R, C)."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
    return x.mT if tall else x


def optimizers(model):
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    tables = [model.token_embedding_table.weight, model.lm_head.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([{"params": tables, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}],
                              lr=lr, fused=True)
    return [adamw, Muon(matrices, lr=muon_lr)]


@torch.no_grad()
def add_to_average(average, model, count):
    """Update the mean of the weights, the middle of the circle in which training ends."""
    for name, p in model.named_parameters():
        average.setdefault(name, p.clone()).lerp_(p, 1 / count)


# ---------------------------------------------------------------- training


@torch.no_grad()
def estimate(model, data):
    model.eval()  # without dropout
    loss = sum(model(*get_batch(data))[1].item() for _ in range(eval_batches)) / eval_batches
    model.train()
    return loss


@torch.no_grad()
def whole(model, data):
    """The loss over the data cut into sequences, so that each character is predicted once."""
    model.eval()
    rows = (len(data) - 1) // block_size
    idx, targets = data[: rows * block_size].view(rows, -1), data[1 : rows * block_size + 1].view(rows, -1)
    batches = zip(idx.to(device).split(batch_size), targets.to(device).split(batch_size), strict=True)
    return sum(model(x, y)[1].item() * len(x) for x, y in batches) / rows


def configure(arguments):
    """Replace the settings at the top by name=value or --large; a lone word names the text."""
    for argument in arguments:
        if argument == "--large":
            globals().update(large)
            continue
        name, _, value = (argument if "=" in argument or argument[:1] == "-" else "text=" + argument).partition("=")
        try:
            globals()[name] = {int: int, float: float, str: str}[type(globals()[name])](value)
        except (KeyError, ValueError):
            sys.exit(f"{argument}: not a setting and its value; usage and settings are at the top of this file")


def main():
    torch.manual_seed(seed)
    content = read_text(text)
    chars = sorted(set(content))
    stoi = {c: i for i, c in enumerate(chars)}
    data = torch.tensor([stoi[c] for c in content])
    train, val = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    if len(val) <= block_size:
        sys.exit(f"{text} is too short: a tenth of it has to be longer than block_size={block_size}")

    model = GPT(len(chars)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    both, average, first = optimizers(model), {}, int(0.8 * steps)
    started = time.time()
    for step in range(steps):
        if step % eval_every == 0:
            print(f"step {step}: train loss {estimate(model, train):.4f}, val loss {estimate(model, val):.4f}, "
                  f"{time.time() - started:.0f} s", flush=True)
        _, loss = model(*get_batch(train))
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step >= first:  # the last fifth of the steps
            add_to_average(average, model, step - first + 1)

    print(f"step {steps}: val loss over every character {whole(model, val):.4f}, ", end="")
    model.load_state_dict(average)
    print(f"with the average of the weights {whole(model, val):.4f}")
    start = torch.zeros((1, 1), dtype=torch.long, device=device)
    print("".join(chars[i] for i in model.generate(start, 500)[0].tolist()))


if __name__ == "__main__":
    configure(sys.argv[1:])
    main()
