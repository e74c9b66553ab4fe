"""A GPT, the lecture's last script: a Transformer that writes like the text it reads, character by character.

    python gpt.py                     # Tiny Shakespeare: input.txt in this folder, downloaded if it is missing
    python gpt.py --large             # the lecture's settings; they take a GPU
    python gpt.py my.txt dropout=0    # a text of yours, and any of the settings below

On two CPU cores it took 6.5 minutes, and ended with: step 1500: val loss over every character 1.7778.
With block_size=8 n_embd=32 n_layer=3 dropout=0 steps=5000 eval_every=1000 eval_batches=50, on one core, 65 s: 2.0436.
This is rung 8 of the course (docs/rungs/08-dropout.md); at that size it is rung 7 but for the initial weights: 2.067.
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
lr = 1e-3  # 3e-4: learning rate
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


class Attention(nn.Module):
    """All heads at once. A query is what a position seeks, a key what it contains, a value what it passes on."""

    def __init__(self):
        super().__init__()
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)), persistent=False)

    def heads(self, x):
        B, T, C = x.shape
        return x.view(B, T, n_head, C // n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
        score = score.masked_fill(self.tril[:T, :T] == 0, float("-inf"))  # no position sees the future
        weight = self.dropout(F.softmax(score, dim=-1))
        out = (weight @ v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, T) @ (B, H, T, D), heads side by side
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """Each position thinks on its own about what it has gathered."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),
            nn.ReLU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Communication, then computation; each only adds to x, which gives the gradient a direct path back."""

    def __init__(self):
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)
        self.sa = Attention()
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = FeedForward()

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)  # what a character is
        self.position_embedding_table = nn.Embedding(block_size, n_embd)  # where it is
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # small weights; smaller still in layers that add to the residual stream
                adds = name.endswith(("proj.weight", "net.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        position = torch.arange(T, device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(position)  # (B, T, C) + (T, C)
        x = self.dropout(x)
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
            logits, _ = self(idx[:, -block_size:])  # there are no embeddings for more positions
            p = F.softmax(logits[:, -1], dim=-1)  # (B, V): the last position predicts the new character
            idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)  # (B, T + 1)
        return idx


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    started = time.time()
    for step in range(steps):
        if step % eval_every == 0:
            print(f"step {step}: train loss {estimate(model, train):.4f}, val loss {estimate(model, val):.4f}, "
                  f"{time.time() - started:.0f} s", flush=True)
        _, loss = model(*get_batch(train))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    print(f"step {steps}: val loss over every character {whole(model, val):.4f}")
    start = torch.zeros((1, 1), dtype=torch.long, device=device)
    print("".join(chars[i] for i in model.generate(start, 500)[0].tolist()))


if __name__ == "__main__":
    configure(sys.argv[1:])
    main()
