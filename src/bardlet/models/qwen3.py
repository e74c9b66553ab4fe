"""Qwen3 (Qwen team 2025, *Qwen3 Technical Report*, section 2): GPT-2 after six years of changes.

RMSNorm instead of LayerNorm, rotary instead of learned positions, grouped queries, a norm on queries and keys, SwiGLU,
and no biases. The modules have Hugging Face's names, so `state_dict()` is the checkpoint. Shape suffixes: `layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError, printable
from bardlet.models.base import LanguageModel, load_strictly
from bardlet.models.hf_config import check_supported, get_value
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


class Attention(nn.Module):
    """Causal self-attention; H query heads share K key-value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps)
        self.k_norm = RMSNorm(D, config.norm_eps)

    def project(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, D), keys and values (both B, T, K, D), with norms and rotary positions applied."""
        B, T, _ = x_BTC.shape
        q_BTHD = self.q_proj(x_BTC).view(B, T, -1, self.head_dim)  # (B, T, HD) -> (B, T, H, D)
        k_BTKD = self.k_proj(x_BTC).view(B, T, -1, self.head_dim)  # (B, T, KD) -> (B, T, K, D)
        v_BTKD = self.v_proj(x_BTC).view(B, T, -1, self.head_dim)
        q_BTHD = apply_rope(self.q_norm(q_BTHD), cos, sin)
        k_BTKD = apply_rope(self.k_norm(k_BTKD), cos, sin)
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)


class Qwen3(LanguageModel):
    """Qwen3 as a language model: token ids in, logits of the next token out."""

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
        cos, sin = rope_cos_sin(position_BT, self.config.head_dim, self.config.rope_theta)  # shared by all layers
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

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """Return the model's part of config.json; the token ids come from the tokenizer.

        The rotary base appears twice: transformers 4 reads `rope_theta`, transformers 5 reads `rope_parameters`.
        """
        return {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.block_size,
            "hidden_size": config.n_embd,
            "intermediate_size": config.n_inner,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "head_dim": config.head_dim,
            "hidden_act": config.activation,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "attention_bias": False,
            "attention_dropout": 0.0,  # Hugging Face has no key for bardlet's dropout
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": config.n_layer,
            "layer_types": ["full_attention"] * config.n_layer,
            "initializer_range": 0.02,
            "tie_word_embeddings": config.tie_embeddings,
        }

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
        """Return the ModelConfig of a config.json. Raises BardletError for settings that bardlet does not support."""
        check_supported(hf, "model_type", "qwen3")
        check_supported(hf, "attention_bias", False)
        check_supported(hf, "use_sliding_window", False)
        check_supported(hf, "hidden_act", "silu", "swish")
        check_supported(hf, "rope_scaling", None)
        rope = hf.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise BardletError(f"config.json: 'rope_parameters' is {printable(rope)}, but must be an object; "
                               "copy the file again")
        check_supported(rope, "rope_type", "default")
        if any(kind != "full_attention" for kind in hf.get("layer_types") or []):
            raise BardletError("config.json: 'layer_types' is not all full_attention; use transformers for this model")
        n_embd, n_head = get_value(hf, "hidden_size", int), get_value(hf, "num_attention_heads", int)
        n_kv_head = get_value(hf, "num_key_value_heads", int, n_head)
        if n_head % n_kv_head:
            raise BardletError(f"config.json: {n_head} query heads cannot share {n_kv_head} key-value heads evenly; "
                               "copy the file again")
        head_dim = get_value(hf, "head_dim", int, 128)
        if head_dim % 2:
            raise BardletError(f"config.json: 'head_dim' is {head_dim}, but rotary positions need an even number; "
                               "copy the file again")
        return ModelConfig(
            model="qwen3",
            vocab_size=get_value(hf, "vocab_size", int),
            block_size=get_value(hf, "max_position_embeddings", int),
            n_layer=get_value(hf, "num_hidden_layers", int),
            n_head=n_head,
            n_kv_head=n_kv_head,
            n_embd=n_embd,
            head_dim=head_dim,
            n_inner=get_value(hf, "intermediate_size", int),
            tie_embeddings=get_value(hf, "tie_word_embeddings", bool, False),
            activation="silu",
            norm_eps=get_value(hf, "rms_norm_eps", float, 1e-6),
            rope_theta=get_value(rope, "rope_theta", float, get_value(hf, "rope_theta", float, 10_000.0)),
        )

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a Hugging Face checkpoint. Raises BardletError if they do not fit."""
        known = dict(tensors)
        if self.lm_head is None:
            known.pop("lm_head.weight", None)
        load_strictly(self, known)
