"""Llama and its relatives: GPT-2 after some years of changes, which most open models share.

RMSNorm instead of LayerNorm, rotary instead of learned positions, grouped queries, SwiGLU, and no biases: Llama
(Touvron et al. 2023), Llama 3 (Meta 2024), SmolLM2, TinyLlama and Mistral. Qwen2 has biases on queries, keys and
values; Qwen3 (Qwen team 2025, *Qwen3 Technical Report*, section 2) a norm on queries and keys instead; in SmolLM3 some
layers have no positions. The modules have Hugging Face's names, so `state_dict()` is the checkpoint. Shape suffixes:
`layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.models import llama_config
from bardlet.models.base import LanguageModel, changed, load_strictly
from bardlet.models.layers import (
    KVCache,
    LayerCache,
    RMSNorm,
    apply_rope,
    init_weights,
    layer_cache,
    positions_and_mask,
    rope_cos_sin,
    update_cache,
)
from bardlet.ops.attention import attention
from bardlet.ops.dropout import Dropout

ROTARY_BUFFER = "rotary_emb.inv_freq"
"""End of the names of frequencies in old checkpoints of Llama 1 and 2; they follow from config.json."""


class Attention(nn.Module):
    """Causal self-attention; H query heads share K key-value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        bias = config.model == "qwen2" or config.attention_bias
        self.head_dim = D
        self.rotates = layer not in config.layers_without_positions
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, K * D, bias=bias)
        self.v_proj = nn.Linear(C, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.model == "qwen3" else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.model == "qwen3" else None

    def project(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, D), keys and values (both B, T, K, D), with norms and rotary positions applied."""
        B, T, _ = x_BTC.shape
        q_BTHD = self.q_proj(x_BTC).view(B, T, -1, self.head_dim)  # (B, T, HD) -> (B, T, H, D)
        k_BTKD = self.k_proj(x_BTC).view(B, T, -1, self.head_dim)  # (B, T, KD) -> (B, T, K, D)
        v_BTKD = self.v_proj(x_BTC).view(B, T, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if self.rotates:
            q_BTHD, k_BTKD = apply_rope(q_BTHD, cos, sin), apply_rope(k_BTKD, cos, sin)
        return q_BTHD, k_BTKD, v_BTKD

    def forward(
        self, x_BTC: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        B, T, _ = x_BTC.shape
        q_BTHD, k_BTKD, v_BTKD = self.project(x_BTC, cos, sin)
        if cache is None:
            k_BKSD, v_BKSD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        else:
            assert mask is not None
            k_BKSD, v_BKSD = update_cache(cache, k_BTKD, v_BTKD, mask.shape[-1])
        y_BHTD = attention(q_BTHD.transpose(1, 2), k_BKSD, v_BKSD, mask)
        return self.o_proj(y_BHTD.transpose(1, 2).reshape(B, T, -1))  # concatenate the heads


class MLP(nn.Module):
    """SwiGLU: one half of the inner layer gates the other (Shazeer 2020, *GLU Variants Improve Transformer*)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Block(nn.Module):
    """Communication, then computation; each adds to the residual stream.

    Dropout applies to what they add (and to the embeddings). On the attention weights, as in GPT-2, it raised the
    loss (LOG.md) and took time.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x_BTC: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        y_BTC = self.self_attn(self.input_layernorm(x_BTC), cos, sin, mask, cache)
        x_BTC = x_BTC + self.dropout(y_BTC)
        return x_BTC + self.dropout(self.mlp(self.post_attention_layernorm(x_BTC)))


class Body(nn.Module):
    """Everything but the head; the checkpoint prefix is `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)


class Llama(LanguageModel):
    """Llama or a relative as a language model: token ids in, logits of the next token out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.dropout = Dropout(config.dropout)
        tied = config.tie_embeddings  # then the head is the token embedding, not a parameter of its own
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("o_proj", "down_proj"), n_layer=config.n_layer)

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None, segment_BT: Tensor | None = None,
               prefix_B: Tensor | None = None) -> Tensor:
        """Return the final hidden states of idx_BT (int64): (B, T, C). See `LanguageModel.hidden`."""
        position_BT, mask = positions_and_mask(idx_BT, self.config.block_size, cache, segment_BT, prefix_B)
        c = self.config
        cos, sin = rope_cos_sin(position_BT, c.head_dim, c.rope_theta, c.rope_scaling)  # shared by all layers
        x_BTC = self.dropout(self.model.embed_tokens(idx_BT))
        for layer, block in enumerate(self.model.layers):
            x_BTC = block(x_BTC, cos, sin, mask, layer_cache(cache, layer, position_BT))
        if cache is not None:
            cache.length_B += idx_BT.shape[1]
        return self.model.norm(x_BTC)

    @property
    def head(self) -> Tensor:
        """The head's weights: (V, C)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    # ------------------------------------------------------------------------ Hugging Face format

    to_hf = staticmethod(llama_config.to_hf)
    from_hf = staticmethod(llama_config.from_hf)

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a Hugging Face checkpoint. Raises BardletError if they do not fit."""
        tied = self.lm_head is None  # a file may hold the shared matrix twice
        names = [name for name in tensors
                 if not (name.endswith(ROTARY_BUFFER) or (tied and name == "lm_head.weight"))]
        load_strictly(self, changed(names, tensors.__getitem__, tensors))
