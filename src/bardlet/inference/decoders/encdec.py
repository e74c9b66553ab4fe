"""The decoder of the encoder-decoder: one more token per row, from packed weights and a cache.

Inference only. Shape suffixes: `models/layers.py`; R rows, the K beams of B sources.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.errors import BardletError
from bardlet.models.encdec import EncDec, EncoderOutput
from bardlet.models.layers import ACTIVATIONS
from bardlet.ops.linear import pack_linear


class Decoder:
    """Decode one token per row, in as few operations as torch allows; a test compares it with EncDec.decode.

    Query, key and value are one linear layer, with the 1 / sqrt(D) of the queries folded in. The residual stream and
    the attention are in fp32 whatever the weights are: attention of one query is many times slower in bf16 on a CPU.
    """

    def __init__(self, model: EncDec, dtype: torch.dtype | None = None) -> None:
        c, body = model.config, model.model
        blocks: Any = body.decoder.layers
        weight = body.shared.weight.detach()
        self.n_head, self.n_embd, self.block_size = c.n_head, c.n_embd, c.block_size
        self.dtype = dtype or weight.dtype
        self.embedding, self.position_TC = weight.float() * model.embedding_scale, model.position_TC.float()
        self.act, scale = ACTIVATIONS[c.activation], (c.n_embd // c.n_head) ** -0.5
        self.norm, self.head = self._norm(body.decoder.layer_norm), self._pack([(weight, None, 1.0)])
        self.blocks = []
        for block in blocks:
            a, x = block.self_attn, block.encoder_attn
            self.blocks.append((
                self._norm(block.self_attn_layer_norm), self._linear((a.q_proj, scale), (a.k_proj, 1), (a.v_proj, 1)),
                self._linear((a.out_proj, 1)),
                self._norm(block.encoder_attn_layer_norm), self._linear((x.q_proj, scale)),
                self._linear((x.out_proj, 1)),
                self._norm(block.final_layer_norm), self._linear((block.fc1, 1)), self._linear((block.fc2, 1)),
            ))  # fmt: skip

    def _linear(self, *parts: tuple[nn.Linear, float]) -> Any:
        """Pack layers with the same input into one, each scaled by a factor."""
        return self._pack([(layer.weight.detach(), layer.bias.detach(), factor) for layer, factor in parts])

    def _pack(self, parts: list[tuple[Tensor, Tensor | None, float]]) -> Any:
        weight = torch.cat([w.float() * factor for w, _, factor in parts])
        bias = None if parts[0][1] is None else torch.cat([b.float() * f for _, b, f in parts if b is not None])
        return pack_linear(weight, bias, self.dtype)

    def _norm(self, norm: nn.LayerNorm) -> Any:
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        return lambda x_RC: F.layer_norm(x_RC, (self.n_embd,), weight, bias, norm.eps).to(self.dtype)

    def new_cache(self, encoded: EncoderOutput, max_tokens: int) -> EncDecCache:
        """Return an empty cache for these sources, with room for `max_tokens` target tokens."""
        if max_tokens > self.block_size:
            raise BardletError(f"{max_tokens} tokens do not fit in a context of {self.block_size}; use fewer")
        return EncDecCache(encoded, max_tokens, len(self.blocks), self.n_head)

    def __call__(self, idx_R: Tensor, cache: EncDecCache) -> Tensor:
        """Append one token (int64) to each row and return the logits of the next one: (R, V) in fp32."""
        R, H = len(idx_R), self.n_head
        x_RC = torch.embedding(self.embedding, idx_R) + self.position_TC[cache.step()]
        for layer, (norm_1, qkv, out, norm_2, query, cross_out, norm_3, fc1, fc2) in enumerate(self.blocks):
            q, k, v = qkv(norm_1(x_RC)).view(R, 3, -1).unbind(1)  # (R, 3C) -> three (R, C)
            x_RC = x_RC + out(cache.attend(layer, q, k, v).to(self.dtype))
            q = query(norm_2(x_RC)).float().view(-1, R // cache.sources, H, self.n_embd // H)  # (B, K, H, D)
            x_RC = x_RC + cross_out(cache.cross_attend(layer, q.transpose(1, 2)).reshape(R, -1).to(self.dtype))
            x_RC = x_RC + fc2(self.act(fc1(norm_3(x_RC))))
        return self.head(self.norm(x_RC)).float()


class EncDecCache:
    """Source and target keys and values of a batch: R rows, the beams of each source adjacent.

    All rows have the same length, so only the padding of the sources is masked. The keys and values of a source are
    stored once: its beams are the queries of one attention. Those of the target are stored by time step, so that
    reordering rows copies only the steps so far. N is R H: rows and heads.
    """

    def __init__(self, encoded: EncoderOutput, max_tokens: int, n_layer: int, n_head: int) -> None:
        self.max_tokens, self.length, self.n_head, self.sources = max_tokens, 0, n_head, len(encoded.length_B)
        # (B, H, S, D) -> (B H, D, S) and (B H, S, D)
        self.source = [(k.float().transpose(-2, -1).flatten(0, 1), v.float().flatten(0, 1)) for k, v in encoded.keys]
        seen = encoded.seen[:, 0]
        # (B, 1, S), added to the scores; None: all sources have the same length
        self.hide = None if bool(seen.all()) else torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, -1e9)
        k_BHSD = encoded.keys[0][0]
        shape = (max_tokens, n_layer, 2, self.sources, k_BHSD.shape[1] * k_BHSD.shape[3])
        self.kv = torch.empty(shape, device=k_BHSD.device)

    def step(self) -> int:
        """Make room for one more token per row and return its position."""
        if self.length == self.max_tokens:
            raise BardletError(f"the cache is full after {self.max_tokens} tokens; create a longer one")
        self.length += 1
        return self.length - 1

    def attend(self, layer: int, q_RC: Tensor, k_RC: Tensor, v_RC: Tensor) -> Tensor:
        """Store a token's key and value and return its self-attention output: (R, C)."""
        R, C = q_RC.shape
        N, D, t = R * self.n_head, C // self.n_head, self.length
        self.kv[t - 1, layer, 0].copy_(k_RC)
        self.kv[t - 1, layer, 1].copy_(v_RC)
        k_NDT = self.kv[:t, layer, 0].view(t, N, D).permute(1, 2, 0)
        v_NTD = self.kv[:t, layer, 1].view(t, N, D).transpose(0, 1)
        weight = torch.bmm(q_RC.float().reshape(N, 1, D), k_NDT).softmax(-1)
        return torch.bmm(weight, v_NTD).view(R, C)  # (N, 1, D) -> (R, HD)

    def cross_attend(self, layer: int, q_BHKD: Tensor) -> Tensor:
        """Return the cross-attention output of each beam's query to its source: (B, K, H, D)."""
        B, H, K, D = q_BHKD.shape
        k_NDS, v_NSD = self.source[layer]
        score = torch.bmm(q_BHKD.reshape(B * H, K, D), k_NDS)
        if self.hide is not None:
            score.view(B, H, K, -1).add_(self.hide[:, None])
        return torch.bmm(score.softmax(-1), v_NSD).view(B, H, K, D).transpose(1, 2)

    def reorder(self, row_R: Tensor) -> None:
        """Keep these rows (int64), in this order; each stays with its source."""
        max_tokens, L, _, R, C = self.kv.shape
        if len(row_R) == R and bool((row_R == torch.arange(R, device=row_R.device)).all()):
            return
        kv = self.kv.new_empty((max_tokens, L, 2, len(row_R), C))
        t = self.length
        torch.index_select(self.kv[:t].flatten(0, 2), 1, row_R, out=kv[:t].flatten(0, 2))
        self.kv = kv

    def select(self, source_B: Tensor, beams: int) -> None:
        """Keep these sources (int64) only, with `beams` rows each."""
        self.reorder((source_B[:, None] * beams + torch.arange(beams, device=source_B.device)).flatten())
        head_N = (source_B[:, None] * self.n_head + torch.arange(self.n_head, device=source_B.device)).flatten()
        self.sources, self.source = len(source_B), [(k[head_N], v[head_N]) for k, v in self.source]
        if self.hide is not None:
            self.hide = self.hide[source_B]
