# Einstein sums, other names, sinusoidal positions, generation as a function.
import math

import torch
from torch import einsum, nn

D_MODEL, HEADS, DEPTH, CTX = 256, 8, 4, 128


class SelfAttn(nn.Module):
    def __init__(self, d_model, heads, ctx_len, p_drop=0.1):
        super().__init__()
        self.heads = heads
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_o = nn.Linear(d_model, d_model)
        self.drop = nn.Dropout(p_drop)
        self.register_buffer("future", torch.triu(torch.ones(ctx_len, ctx_len, dtype=torch.bool), diagonal=1))

    def forward(self, h):
        b, n, d = h.shape
        q, k, v = (w(h).reshape(b, n, self.heads, d // self.heads) for w in (self.w_q, self.w_k, self.w_v))
        logits = einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d // self.heads)
        logits = logits.masked_fill(self.future[:n, :n], -1e9)
        att = self.drop(logits.softmax(dim=-1))
        return self.w_o(einsum("bhij,bjhd->bihd", att, v).reshape(b, n, d))


class Layer(nn.Module):
    def __init__(self, d_model, heads, ctx_len, p_drop=0.1):
        super().__init__()
        self.norm_att, self.norm_ff = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.att = SelfAttn(d_model, heads, ctx_len, p_drop)
        self.ff = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, h):
        h = self.att(self.norm_att(h)) + h
        return self.ff(self.norm_ff(h)) + h


def sinusoids(n, d):
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(n, d)


class CharLM(nn.Module):
    def __init__(self, n_vocab, d_model=D_MODEL, heads=HEADS, depth=DEPTH, ctx_len=CTX):
        super().__init__()
        self.ctx_len = ctx_len
        self.embed = nn.Embedding(n_vocab, d_model)
        self.register_buffer("where", sinusoids(ctx_len, d_model))
        self.layers = nn.ModuleList(Layer(d_model, heads, ctx_len) for _ in range(depth))
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, n_vocab)

    def forward(self, tokens):
        h = self.embed(tokens) + self.where[: tokens.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return self.out(self.norm(h))


@torch.inference_mode()
def generate(model, tokens, n_new, temperature=1.0):
    for _ in range(n_new):
        logits = model(tokens[:, -model.ctx_len:])[:, -1] / temperature
        tokens = torch.cat([tokens, torch.distributions.Categorical(logits=logits).sample()[:, None]], dim=-1)
    return tokens


def train_step(model, batch, optimizer):
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
