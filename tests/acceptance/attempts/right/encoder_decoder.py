import math
from typing import Optional

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """One attention module for the three uses: encoder self, decoder self (causal), decoder-to-encoder."""

    def __init__(self, d_model: int, n_heads: int, causal: bool = False):
        super().__init__()
        self.n_heads = n_heads
        self.d_head = d_model // n_heads
        self.causal = causal
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, d_model)
        self.W_v = nn.Linear(d_model, d_model)
        self.W_o = nn.Linear(d_model, d_model)

    def split(self, t: Tensor) -> Tensor:
        return t.view(t.size(0), t.size(1), self.n_heads, self.d_head).transpose(1, 2)

    def forward(self, query: Tensor, memory: Optional[Tensor] = None, pad_mask: Optional[Tensor] = None) -> Tensor:
        """pad_mask: (B, S), True where the memory has a real token."""
        memory = query if memory is None else memory
        q, k, v = self.split(self.W_q(query)), self.split(self.W_k(memory)), self.split(self.W_v(memory))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_head)
        if self.causal:
            T = query.size(1)
            scores = scores.masked_fill(torch.ones(T, T, device=query.device).triu(1).bool(), -1e9)
        if pad_mask is not None:
            scores = scores.masked_fill(~pad_mask[:, None, None, :], -1e9)
        out = scores.softmax(dim=-1) @ v
        return self.W_o(out.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.self_attn = Attention(d_model, n_heads)
        self.ff = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, pad_mask: Optional[Tensor] = None) -> Tensor:
        x = x + self.self_attn(self.norm1(x), pad_mask=pad_mask)
        return x + self.ff(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.self_attn = Attention(d_model, n_heads, causal=True)
        self.cross_attn = Attention(d_model, n_heads)
        self.ff = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, memory: Tensor, memory_pad_mask: Optional[Tensor] = None) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), memory, memory_pad_mask)
        return x + self.ff(self.norm3(x))


class Seq2Seq(nn.Module):
    def __init__(self, src_vocab: int, tgt_vocab: int, d_model: int = 64, n_heads: int = 4, n_layers: int = 2,
                 max_len: int = 64, pad: int = 0):
        super().__init__()
        self.pad = pad
        self.src_emb, self.tgt_emb = nn.Embedding(src_vocab, d_model), nn.Embedding(tgt_vocab, d_model)
        self.src_pos, self.tgt_pos = nn.Embedding(max_len, d_model), nn.Embedding(max_len, d_model)
        self.encoder = nn.ModuleList([EncoderBlock(d_model, n_heads) for _ in range(n_layers)])
        self.decoder = nn.ModuleList([DecoderBlock(d_model, n_heads) for _ in range(n_layers)])
        self.enc_norm, self.dec_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, tgt_vocab)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        real = src != self.pad
        h = self.src_emb(src) + self.src_pos(torch.arange(src.size(1), device=src.device))
        for block in self.encoder:
            h = block(h, real)
        h = self.enc_norm(h)
        y = self.tgt_emb(tgt) + self.tgt_pos(torch.arange(tgt.size(1), device=tgt.device))
        for block in self.decoder:
            y = block(y, h, real)
        return self.out(self.dec_norm(y))
