"""An encoder-decoder, the Transformer of 2017: it translates English sentences into French.

    python encdec.py               # needs no text: a small grammar writes the sentences
    python encdec.py steps=3000    # any of the settings below

Of 200 sentences that it never saw, these shares came out exactly right on one of two CPU cores, both busy:
    step 0: 0.0%    step 100: 40.5%    step 150: 99.0%    step 200: 99.5% (59 s)
The map at the end is the picture of cross-attention in docs/encoder-decoder.md.
"""

import random
import sys
import time

import torch
import torch.nn as nn
from torch.nn import functional as F

# ---- settings
n_embd = 64  # C, channels
n_head = 4  # H, heads of attention, each with D = C / H channels
n_layer = 2  # blocks of the encoder, and of the decoder
batch_size = 64  # B, pairs in a batch
lr = 2e-3  # learning rate
steps = 300
n_pairs = 20_000  # sentences to write, before equal ones are dropped
n_held_out = 200
seed = 1337
device = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------- the sentences: French words agree and change places

# singular and plural; in French, with the gender
NOUNS = {"cat cats": "m chat chats", "dog dogs": "m chien chiens", "king kings": "m roi rois",
         "horse horses": "m cheval chevaux", "book books": "m livre livres", "queen queens": "f reine reines",
         "girl girls": "f fille filles", "house houses": "f maison maisons", "flower flowers": "f fleur fleurs",
         "car cars": "f voiture voitures"}
# masculine, feminine, and their plurals; some stand before the noun, colors after it
BEFORE = {"small": "petit petite petits petites", "big": "grand grande grands grandes",
          "old": "vieux vieille vieux vieilles", "pretty": "joli jolie jolis jolies"}
AFTER = {"black": "noir noire noirs noires", "white": "blanc blanche blancs blanches",
         "green": "vert verte verts vertes", "red": "rouge rouge rouges rouges"}
VERBS = {"sees see": "voit voient", "finds find": "trouve trouvent", "follows follow": "suit suivent",
         "carries carry": "porte portent", "knows know": "connaît connaissent"}


def noun_phrase(negated):
    """Return an English phrase, the French one, and whether they are plural; negated: the object of a negation."""
    plural, definite = random.random() < 0.5, random.random() < 0.5
    english, french = random.choice(list(NOUNS.items()))
    gender, *nouns = french.split()
    before, after = (random.choice([None, *table]) for table in (BEFORE, AFTER))
    form = 2 * plural + (gender == "f")
    adjectives = [BEFORE[before].split()[form]] if before else []
    if definite:
        article = "les" if plural else "la" if gender == "f" else "le"
    elif negated or (plural and before):
        article = "de"  # "ne voit pas de chat", "de petits chats"
    else:
        article = "des" if plural else "une" if gender == "f" else "un"
    theirs = ["the" if definite else "some" if plural else "a", before, after, english.split()[plural]]
    ours = [article, *adjectives, nouns[plural], AFTER[after].split()[form] if after else None]
    return [w for w in theirs if w], [w for w in ours if w], plural


def sentence():
    """Return a sentence in English and in French, as words."""
    negated = random.random() < 0.3
    subject, sujet, plural = noun_phrase(False)
    thing, objet, _ = noun_phrase(negated)
    english, french = random.choice(list(VERBS.items()))
    verb, verbe = [english.split()[plural]], [french.split()[plural]]
    if negated:
        verb, verbe = ["do" if plural else "does", "not", english.split()[1]], ["ne", *verbe, "pas"]
    return [*subject, *verb, *thing], [*sujet, *verbe, *objet]


def vocabulary(sentences):
    """Return the words of a language; the first two are the padding and the beginning or end of a sentence."""
    return ["", "|", *sorted({word for sentence in sentences for word in sentence})]


def encode(sentences, words):
    """Return ids, padded on the right with 0: (B, S)."""
    stoi = {word: i for i, word in enumerate(words)}
    rows = [torch.tensor([stoi[word] for word in sentence]) for sentence in sentences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


# ---------------------------------------------------------------- the model


class Attention(nn.Module):
    """Queries from x, keys and values from y: in self-attention y is x, in cross-attention it is the source."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)
        self.value, self.proj = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)

    def heads(self, x):
        B, T, C = x.shape
        return x.view(B, T, n_head, C // n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x, y, mask):
        B, T, C = x.shape
        q, k, v = self.heads(self.query(x)), self.heads(self.key(y)), self.heads(self.value(y))
        score = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
        self.weight = F.softmax(score.masked_fill(~mask, float("-inf")), dim=-1)  # kept for the map at the end
        out = (self.weight @ v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, S) @ (B, H, S, D), heads side by side
        return self.proj(out)


class Block(nn.Module):
    """The block of a GPT. In the decoder it also looks at the source."""

    def __init__(self, decoder):
        super().__init__()
        self.ln1, self.sa = nn.LayerNorm(n_embd), Attention()
        if decoder:
            self.ln_cross, self.cross = nn.LayerNorm(n_embd), Attention()
        self.ln2 = nn.LayerNorm(n_embd)
        self.ffwd = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x, mask, source=None, source_mask=None):
        h = self.ln1(x)
        x = x + self.sa(h, h, mask)
        if source is not None:
            x = x + self.cross(self.ln_cross(x), source, source_mask)
        return x + self.ffwd(self.ln2(x))


class EncoderDecoder(nn.Module):
    def __init__(self, n_english, n_french):
        super().__init__()
        self.english, self.french = nn.Embedding(n_english, n_embd), nn.Embedding(n_french, n_embd)
        self.position_embedding_table = nn.Embedding(32, n_embd)
        self.encoder = nn.ModuleList(Block(decoder=False) for _ in range(n_layer))
        self.decoder = nn.ModuleList(Block(decoder=True) for _ in range(n_layer))
        self.ln_encoder, self.ln_decoder = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, n_french, bias=False)
        for table in (self.english, self.french, self.position_embedding_table):
            nn.init.normal_(table.weight, std=0.02)

    def embed(self, table, idx):
        return table(idx) + self.position_embedding_table(torch.arange(idx.shape[1], device=idx.device))

    def encode(self, source):
        seen = (source != 0)[:, None, None]  # (B, 1, 1, S): in both directions, all but the padding
        x = self.embed(self.english, source)  # (B, S) -> (B, S, C)
        for block in self.encoder:
            x = block(x, seen)
        return self.ln_encoder(x), seen

    def decode(self, idx, source, seen):
        T = idx.shape[1]
        causal = torch.tril(torch.ones(T, T, dtype=torch.bool, device=idx.device))  # padding is on the right: unseen
        x = self.embed(self.french, idx)  # (B, T) -> (B, T, C)
        for block in self.decoder:
            x = block(x, causal, source, seen)
        return self.lm_head(self.ln_decoder(x))  # (B, T, C) -> (B, T, V)

    def forward(self, source, target):
        """Return the loss of target (B, T + 1), which begins and ends with 1, given source (B, S)."""
        logits = self.decode(target[:, :-1], *self.encode(source))
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)

    @torch.no_grad()
    def translate(self, source):
        """Return the likeliest next word again and again: (B, S) -> (B, T), from the beginning of each sentence."""
        encoded = self.encode(source)  # once
        idx = torch.ones_like(source[:, :1])
        for _ in range(20):
            idx = torch.cat([idx, self.decode(idx, *encoded)[:, -1:].argmax(-1)], dim=1)
        return idx


# ---------------------------------------------------------------- training


def words_of(row, words):
    """Return the words between the beginning and the end of a row."""
    ids = row[1:].tolist()
    return [words[i] for i in ids[: ids.index(1)] if i] if 1 in ids else []


def exact(model, pairs, english, french):
    """Return the share of sentences whose every word is right."""
    rows = model.translate(encode([source for source, _ in pairs], english))
    return sum(words_of(row, french) == target for row, (_, target) in zip(rows, pairs, strict=True)) / len(pairs)


def attention_map(model, pair, english, french):
    """Return the weights of the last cross-attention, the mean of its heads, in percent: a row for a French word."""
    source, target = encode([pair[0]], english), encode([["|", *pair[1]]], french)
    with torch.no_grad():
        model.decode(target, *model.encode(source))
    weight = model.decoder[-1].cross.weight[0].mean(0)  # (1, H, T, S) -> (T, S)
    lines = [" " * 12 + "".join(f"{word:>8}" for word in pair[0])]
    for word, row in zip(pair[1], weight, strict=False):  # the row that predicts the word
        lines.append(f"{word:>12}" + "".join(f"{100 * w:8.0f}" if w > 0.05 else f"{'.':>8}" for w in row.tolist()))
    return "\n".join(lines)


def configure(arguments):
    """Replace the settings at the top by name=value."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            globals()[name] = {int: int, float: float, str: str}[type(globals()[name])](value)
        except (KeyError, ValueError):
            sys.exit(f"{argument}: not a setting and its value; usage and settings are at the top of this file")


def main():
    torch.manual_seed(seed)
    random.seed(seed)
    pairs = {" ".join(source): (source, target) for source, target in (sentence() for _ in range(n_pairs))}
    pairs = list(pairs.values())  # all different
    held_out, train = pairs[:n_held_out], pairs[n_held_out:]
    english, french = (vocabulary(pair[i] for pair in pairs) for i in (0, 1))
    sources, targets = encode([s for s, _ in train], english), encode([["|", *t, "|"] for _, t in train], french)

    model = EncoderDecoder(len(english), len(french)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; {len(train):,} pairs to train on")
    print(f"step 0: {exact(model, held_out, english, french):.1%} of the held-out sentences exactly right", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    started = time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 50, 2 * (1 - step / steps) + 0.01)  # rises, stays, falls
        rows = torch.randint(len(train), (batch_size,), device=device)
        loss = model(sources[rows], targets[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}, {exact(model, held_out, english, french):.1%} exactly right, "
                  f"{time.time() - started:.0f} s", flush=True)
    longest = max(held_out, key=lambda pair: len(pair[1]))
    print(attention_map(model, longest, english, french))


if __name__ == "__main__":
    configure(sys.argv[1:])
    main()
