"""A bigram model of characters, the lecture's first script: a table of which character follows which.

    python bigram.py                      # Tiny Shakespeare: input.txt in this folder, downloaded if it is missing
    python bigram.py my.txt steps=1000    # a text of yours, and any of the settings below

On two CPU cores it took 6 s, and ended with
    step 3000: val loss over every character 2.4853
This is rung 1 of the course (docs/rungs/01-bigram.md), which has 2.488.
"""

import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

# ---- settings
text = "input.txt"
batch_size = 32  # B: sequences in a batch
block_size = 8  # T: characters in a sequence
steps = 3000
lr = 1e-2  # learning rate
eval_every = 500
eval_batches = 200
seed = 1337
device = "cuda" if torch.cuda.is_available() else "cpu"

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


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


class Bigram(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)  # row: a character, column: the next

    def forward(self, idx, targets=None):
        logits = self.token_embedding_table(idx)  # (B, T) -> (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B * T, V) and (B * T)

    @torch.no_grad()
    def generate(self, idx, length):
        for _ in range(length):
            logits, _ = self(idx)
            p = F.softmax(logits[:, -1], dim=-1)  # (B, V): only the last position predicts a new character
            idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)  # (B, T + 1)
        return idx


@torch.no_grad()
def estimate(model, data):
    return sum(model(*get_batch(data))[1].item() for _ in range(eval_batches)) / eval_batches


def configure(arguments):
    """Replace the settings at the top by name=value; a lone word names the text."""
    for argument in arguments:
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

    model = Bigram(len(chars)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        if step % eval_every == 0:
            print(f"step {step}: train loss {estimate(model, train):.4f}, val loss {estimate(model, val):.4f}")
        _, loss = model(*get_batch(train))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with torch.no_grad():  # each character predicted once
        _, loss = model(val[None, :-1].to(device), val[None, 1:].to(device))
    print(f"step {steps}: val loss over every character {loss.item():.4f}")
    start = torch.zeros((1, 1), dtype=torch.long, device=device)
    print("".join(chars[i] for i in model.generate(start, 300)[0].tolist()))


if __name__ == "__main__":
    configure(sys.argv[1:])
    main()
