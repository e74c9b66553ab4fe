"""GPT-2 (Radford et al. 2019): the lecture's GPT, with pre-norm blocks, learned positions and GELU.

The modules have Hugging Face's names, so `state_dict()` is the checkpoint, with one exception: Hugging Face stores the
four matrices of a block transposed (its `Conv1D`). Shape suffixes: `layers.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bardlet.config.model import ModelConfig
from bardlet.errors import BardletError
from bardlet.models.base import LanguageModel, changed, load_strictly
from bardlet.models.hf_config import check_supported, get_value
from bardlet.models.layers import (
    ACTIVATIONS,
    KVCache,
    LayerCache,
    init_weights,
    layer_cache,
    positions_and_mask,
    update_cache,
)
from bardlet.ops.attention import attention
from bardlet.ops.dropout import Dropout

log = logging.getLogger("bardlet")


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(C, 3 * C)  # query, key and value in one matmul
        self.c_proj = nn.Linear(C, C)
        self.resid_dropout = Dropout(config.dropout)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values: three (B, T, H, D)."""
        B, T, C = x_BTC.shape
        qkv = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3C) -> (B, T, 3, H, D)
        q_BTHD, k_BTHD, v_BTHD = qkv.unbind(2)
        return q_BTHD, k_BTHD, v_BTHD

    def forward(self, x_BTC: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x_BTC.shape
        q_BTHD, k_BTHD, v_BTHD = self.project(x_BTC)
        if cache is None:
            k_BHSD, v_BHSD = k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
        else:
            assert mask is not None
            k_BHSD, v_BHSD = update_cache(cache, k_BTHD, v_BTHD, mask.shape[-1])
        dropout = self.dropout if self.training else 0.0
        y_BHTD = attention(q_BTHD.transpose(1, 2), k_BHSD, v_BHSD, mask, dropout)
        y_BTC = y_BHTD.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y_BTC))


class MLP(nn.Module):
    """Feed-forward layer, applied to each position separately."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.act = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x_BTC))))


class Block(nn.Module):
    """Communication, then computation; each adds to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), mask, cache)
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class Body(nn.Module):
    """Everything but the head; the checkpoint prefix is `transformer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what a token is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it is
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.norm_eps)


class GPT2(LanguageModel):
    """GPT-2 as a language model: token ids in, logits of the next token out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Body(config)
        tied = config.tie_embeddings  # then the head is the token embedding, not a parameter of its own
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, residual=("c_proj",), n_layer=config.n_layer)

    def hidden(self, idx_BT: Tensor, cache: KVCache | None = None, segment_BT: Tensor | None = None,
               prefix_B: Tensor | None = None) -> Tensor:
        """Return the final hidden states of idx_BT (int64): (B, T, C). See `LanguageModel.hidden`."""
        position_BT, mask = positions_and_mask(idx_BT, self.config.block_size, cache, segment_BT, prefix_B)
        gpt = self.transformer
        x_BTC = gpt.drop(gpt.wte(idx_BT) + gpt.wpe(position_BT))
        for layer, block in enumerate(gpt.h):
            x_BTC = block(x_BTC, mask, layer_cache(cache, layer, position_BT))
        if cache is not None:
            cache.length_B += idx_BT.shape[1]
        return gpt.ln_f(x_BTC)

    @property
    def head(self) -> Tensor:
        """The head's weights: (V, C)."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    # ------------------------------------------------------------------------ Hugging Face format

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """Return the model's part of config.json; the token ids come from the tokenizer."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,  # what llama.cpp's converter reads
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_inner,
            "activation_function": config.activation,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "layer_norm_epsilon": config.norm_eps,
            "initializer_range": 0.02,
            "tie_word_embeddings": config.tie_embeddings,
        }

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
        """Return the ModelConfig of a config.json. Raises BardletError for settings that bardlet does not support."""
        check_supported(hf, "model_type", "gpt2")
        check_supported(hf, "scale_attn_weights", True)
        check_supported(hf, "scale_attn_by_inverse_layer_idx", False)
        check_supported(hf, "add_cross_attention", False)
        check_supported(hf, "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu", "relu")
        activation = get_value(hf, "activation_function", str, "gelu_new")
        n_embd, n_head = get_value(hf, "n_embd", int), get_value(hf, "n_head", int)
        if n_embd % n_head:
            raise BardletError(f"config.json: n_embd {n_embd} is not divisible by n_head {n_head}; copy the file again")
        dropout = get_value(hf, "resid_pdrop", float, 0.1)
        for key in ("embd_pdrop", "attn_pdrop"):
            if get_value(hf, key, float, 0.1) != dropout:
                log.warning("config.json: %s differs from resid_pdrop; bardlet uses %s for all three", key, dropout)
        return ModelConfig(
            model="gpt2",
            vocab_size=get_value(hf, "vocab_size", int),
            block_size=get_value(hf, "n_positions", int, 1024),
            n_layer=get_value(hf, "n_layer", int),
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_embd,
            head_dim=n_embd // n_head,
            n_inner=get_value(hf, "n_inner", int, 4 * n_embd),
            dropout=dropout,
            tie_embeddings=get_value(hf, "tie_word_embeddings", bool, True),
            activation="gelu_new" if activation == "gelu_pytorch_tanh" else activation,
            norm_eps=get_value(hf, "layer_norm_epsilon", float, 1e-5),
        )

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Return the checkpoint: Hugging Face's names and layout, contiguous, without a tied head."""
        return {name: _transposed(name, tensor).contiguous() for name, tensor in self.state_dict().items()}

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a Hugging Face checkpoint. Raises BardletError if they do not fit."""
        known = {name: name for name in tensors if not name.endswith((".attn.bias", ".masked_bias"))}
        if not any(name.startswith("transformer.") for name in known):  # the original gpt2 upload has no prefix
            known = {name if name == "lm_head.weight" else f"transformer.{name}": name for name in known}
        if self.lm_head is None:
            known.pop("lm_head.weight", None)
        load_strictly(self, changed(
            known, lambda name: _transposed(name, tensors[known[name]]).contiguous(), tensors))


def _transposed(name: str, tensor: Tensor) -> Tensor:
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return tensor.t() if name.endswith(matrices) else tensor
