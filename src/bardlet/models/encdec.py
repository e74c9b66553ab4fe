"""The encoder-decoder (Vaswani et al. 2017, *Attention Is All You Need*): the half that the lecture skips.

The encoder reads the whole source and masks only the padding. The decoder is a GPT with a causal mask and, in each
block, cross-attention: its queries come from the target, its keys and values from the source. Blocks are pre-norm, as
in GPT-2; positions are the paper's sinusoids; source, target and head share one embedding table. The layout is that of
Pegasus: the modules have its names, so `state_dict()` is the checkpoint.
Shape suffixes: `layers.py`; S positions of the source, T of the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.config.model import MAX_SINUSOIDS, ModelConfig
from bardlet.errors import BardletError
from bardlet.models.base import Predictor, Reduction, changed, load_strictly
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

KeysAndValues = tuple[Tensor, Tensor]  # k_BHSD, v_BHSD of a sequence


@dataclass
class EncoderOutput:
    """The encoded sources, as the decoder reads them; computed once per source.

    keys: the cross-attention's keys and values for each decoder layer, two (B, H, S, D). seen: (B, 1, 1, S) boolean,
    False where a source is padding. length_B: int64, the length of each source.
    """

    keys: list[KeysAndValues]
    seen: Tensor
    length_B: Tensor


class Attention(nn.Module):
    """Attention from x to given keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def keys_and_values(self, x_BSC: Tensor) -> KeysAndValues:
        """Return the keys and values of a sequence: two (B, H, S, D)."""
        return self._heads(self.k_proj(x_BSC)), self._heads(self.v_proj(x_BSC))

    def forward(self, x_BTC: Tensor, keys: KeysAndValues, mask: Tensor | None) -> Tensor:
        B, T, C = x_BTC.shape
        y_BHTD = attention(self._heads(self.q_proj(x_BTC)), *keys, mask)
        return self.out_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))  # concatenate the heads

    def _heads(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        return x_BTC.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


class Sublayers(nn.Module):
    """The layers that both kinds of block have: self-attention and the feed-forward layer, each with its norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.self_attn_layer_norm = nn.LayerNorm(C, config.norm_eps)
        self.self_attn = Attention(config)
        self.final_layer_norm = nn.LayerNorm(C, config.norm_eps)
        self.fc1 = nn.Linear(C, config.n_inner)
        self.fc2 = nn.Linear(config.n_inner, C)
        self.act = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)

    def mlp(self, x_BTC: Tensor) -> Tensor:
        """Apply the feed-forward layer to each position separately."""
        return self.fc2(self.act(self.fc1(x_BTC)))


class Block(Sublayers):
    """Encoder block: attention to the whole source, then computation. The decoder block adds cross-attention."""

    def forward(self, x_BSC: Tensor, seen: Tensor) -> Tensor:
        h_BSC = self.self_attn_layer_norm(x_BSC)
        x_BSC = x_BSC + self.dropout(self.self_attn(h_BSC, self.self_attn.keys_and_values(h_BSC), seen))
        return x_BSC + self.dropout(self.mlp(self.final_layer_norm(x_BSC)))


class CrossBlock(Sublayers):
    """Decoder block: attention to the target so far, attention to the source, then computation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.encoder_attn = Attention(config)

    def forward(self, x_BTC: Tensor, source: KeysAndValues, seen: Tensor, mask: Tensor | None = None,
                cache: LayerCache | None = None) -> Tensor:
        h_BTC = self.self_attn_layer_norm(x_BTC)
        keys = self.self_attn.keys_and_values(h_BTC)
        if cache is not None:
            assert mask is not None
            k_BTHD, v_BTHD = (x.transpose(1, 2) for x in keys)
            keys = update_cache(cache, k_BTHD, v_BTHD, mask.shape[-1])
        x_BTC = x_BTC + self.dropout(self.self_attn(h_BTC, keys, mask))  # no mask: causal
        h_BTC = self.encoder_attn_layer_norm(x_BTC)
        x_BTC = x_BTC + self.dropout(self.encoder_attn(h_BTC, source, seen))
        return x_BTC + self.dropout(self.mlp(self.final_layer_norm(x_BTC)))


class Stack(nn.Module):
    """Blocks and a final norm; the checkpoint names are `encoder` and `decoder`."""

    def __init__(self, config: ModelConfig, block: type[Sublayers], n_layer: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(config) for _ in range(n_layer))
        self.layer_norm = nn.LayerNorm(config.n_embd, config.norm_eps)


class Body(nn.Module):
    """The whole model, since the head is the embedding table; the checkpoint prefix is `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, Block, config.n_encoder_layer)
        self.decoder = Stack(config, CrossBlock, config.n_layer)


POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
COPIES = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
"""Names under which a checkpoint may hold the shared table again."""


class EncDec(Predictor):
    """An encoder-decoder: ids of the source and of the target so far in, logits of the target's next token out."""

    position_TC: Tensor
    compared = (*POSITIONS, "final_logits_bias")
    """Tensors of a checkpoint that are no weights: they have to be what this model computes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.dropout = Dropout(config.dropout)
        self.register_buffer("position_TC", sinusoids(config.block_size, config.n_embd), persistent=False)
        # each decoder block adds to the residual stream three times
        init_weights(self, residual=("out_proj", "fc2"), n_layer=1.5 * config.n_layer)
        # `embed` scales this to 0.3, half the size of the positions; at 1 the untrained head would repeat its input
        nn.init.normal_(self.model.shared.weight, std=0.3 * config.n_embd**-0.5)

    def fill_buffers(self) -> None:
        """Compute the position embeddings, which no file needs to have, of a model that was made without memory."""
        like = self.model.shared.weight
        device = torch.device("cpu") if like.is_meta else like.device
        self.position_TC = sinusoids(self.config.block_size, self.config.n_embd).to(device, like.dtype)

    @property
    def embedding_scale(self) -> float:
        """The factor of the token embeddings in the input: sqrt(n_embd), or 1 in some foreign folders."""
        return math.sqrt(self.config.n_embd) if self.config.scale_embedding else 1.0

    def embed(self, idx_BT: Tensor, position_BT: Tensor) -> Tensor:
        """Return the sum of token and position embeddings, after dropout: (B, T, C)."""
        return self.dropout(self.model.shared(idx_BT) * self.embedding_scale + self.position_TC[position_BT])

    def encode(self, src_BS: Tensor, length_B: Tensor | None = None) -> EncoderOutput:
        """Encode sources (int64), padded on the right with any id; length_B (int64): their lengths, None: all S.

        Raises BardletError if S is greater than block_size.
        """
        B, S = src_BS.shape
        if self.config.block_size < S:
            raise BardletError(f"a source of {S} tokens does not fit in a context of {self.config.block_size}; "
                               "use a shorter one")
        position_1S = torch.arange(S, device=src_BS.device)[None]
        length_B = torch.full_like(src_BS[:, 0], S) if length_B is None else length_B
        seen = (position_1S < length_B[:, None])[:, None, None]  # every token of the source, in both directions
        x_BSC = self.embed(src_BS, position_1S)
        for block in self.model.encoder.layers:
            x_BSC = block(x_BSC, seen)
        x_BSC = self.model.encoder.layer_norm(x_BSC)
        blocks: Any = self.model.decoder.layers
        return EncoderOutput([block.encoder_attn.keys_and_values(x_BSC) for block in blocks], seen, length_B)

    def hidden(self, tgt_BT: Tensor, memory: EncoderOutput, cache: KVCache | None = None) -> Tensor:
        """Return the final hidden states of tgt_BT (int64): (B, T, C). The causal mask hides padding on the right.

        Writes the new keys and values into a given cache and increases its length_B by T.
        """
        position_BT, mask = positions_and_mask(tgt_BT, self.config.block_size, cache)
        x_BTC = self.embed(tgt_BT, position_BT)
        for layer, block in enumerate(self.model.decoder.layers):
            x_BTC = block(x_BTC, memory.keys[layer], memory.seen, mask, layer_cache(cache, layer, position_BT))
        if cache is not None:
            cache.length_B += tgt_BT.shape[1]
        return self.model.decoder.layer_norm(x_BTC)

    @property
    def head(self) -> Tensor:
        """The head's weights, the embedding table: (V, C)."""
        return self.model.shared.weight

    def decode(self, tgt_BT: Tensor, memory: EncoderOutput, cache: KVCache | None = None) -> Tensor:
        """Return the logits of the token after each of tgt_BT: (B, T, V); options as for `hidden`."""
        return self.logits(self.hidden(tgt_BT, memory, cache))

    def forward(self, src_BS: Tensor, tgt_BT: Tensor, length_B: Tensor | None = None, target_BT: Tensor | None = None,
                *, reduction: Reduction = "sum", smoothing: float = 0.0) -> Tensor:
        """Return the logits of the token after each of tgt_BT, given the sources: (B, T, V). With targets, their loss.

        `LanguageModel.forward` explains the targets and the loss, `encode` explains length_B.
        """
        x_BTC = self.hidden(tgt_BT, self.encode(src_BS, length_B))
        return self.logits_or_loss(x_BTC, target_BT, reduction, smoothing, 1.0)

    @torch.no_grad()
    def cross_attention(self, src_BS: Tensor, tgt_BT: Tensor, length_B: Tensor | None = None) -> Tensor:
        """Return the cross-attention weights of each layer and head: (L, B, H, T, S), each row summing to 1."""
        memory, queries = self.encode(src_BS, length_B), []
        blocks: Any = self.model.decoder.layers
        hooks = [b.encoder_attn.q_proj.register_forward_hook(lambda m, x, y: queries.append(y)) for b in blocks]
        try:
            self.hidden(tgt_BT, memory)
        finally:
            for hook in hooks:
                hook.remove()
        maps = []
        for block, q_BTC, (k_BHSD, _) in zip(blocks, queries, memory.keys, strict=True):
            q_BHTD = block.encoder_attn._heads(q_BTC)
            score = q_BHTD @ k_BHSD.transpose(-2, -1) / math.sqrt(q_BHTD.shape[-1])
            maps.append(score.masked_fill(~memory.seen, -math.inf).softmax(-1))
        return torch.stack(maps)

    # ------------------------------------------------------------------------ Hugging Face format

    @staticmethod
    def to_hf(config: ModelConfig) -> dict[str, Any]:
        """Return the model's part of config.json; the token ids come from the tokenizer."""
        return {
            "model_type": "pegasus",
            "architectures": ["PegasusForConditionalGeneration"],
            "is_encoder_decoder": True,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.block_size,
            "d_model": config.n_embd,
            "encoder_layers": config.n_encoder_layer,
            "decoder_layers": config.n_layer,
            "encoder_attention_heads": config.n_head,
            "decoder_attention_heads": config.n_head,
            "encoder_ffn_dim": config.n_inner,
            "decoder_ffn_dim": config.n_inner,
            "activation_function": config.activation,
            "dropout": config.dropout,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            # the form of every pegasus; CTranslate2 reads it here
            "normalize_before": True,
            "normalize_embedding": False,
            "scale_embedding": config.scale_embedding,
            "init_std": 0.02,
            "tie_word_embeddings": True,
        }

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
        """Return the ModelConfig of a config.json. Raises BardletError for settings that bardlet does not support."""
        check_supported(hf, "model_type", "pegasus")
        check_supported(hf, "tie_word_embeddings", True)
        check_supported(hf, "activation_function", *ACTIVATIONS)
        check_supported({"decoder_start_token_id": 0, **hf}, "decoder_start_token_id", hf.get("pad_token_id", 0))
        n_embd, n_head = get_value(hf, "d_model", int), get_value(hf, "encoder_attention_heads", int)
        check_supported(hf, "decoder_attention_heads", n_head)
        n_inner = get_value(hf, "encoder_ffn_dim", int)
        check_supported(hf, "decoder_ffn_dim", n_inner)
        if n_embd % n_head or n_embd % 2:
            raise BardletError(f"config.json: d_model {n_embd} is odd or not divisible by {n_head} heads; "
                               "copy the file again")
        block_size = get_value(hf, "max_position_embeddings", int)
        if block_size > MAX_SINUSOIDS:
            raise BardletError(f"config.json: a context of {block_size} tokens; bardlet supports sinusoids for at most "
                               f"{MAX_SINUSOIDS}")
        return ModelConfig(
            model="encdec",
            vocab_size=get_value(hf, "vocab_size", int),
            block_size=block_size,
            n_layer=get_value(hf, "decoder_layers", int),
            n_encoder_layer=get_value(hf, "encoder_layers", int),
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_embd,
            head_dim=n_embd // n_head,
            n_inner=n_inner,
            dropout=get_value(hf, "dropout", float, 0.1),
            tie_embeddings=True,
            activation=get_value(hf, "activation_function", str, "gelu"),
            norm_eps=1e-5,
            scale_embedding=get_value(hf, "scale_embedding", bool, False),  # the default of transformers
        )

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Return the checkpoint: Hugging Face's names and layout, with the positions, which transformers expects."""
        own = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        return {**own, **{name: self.position_TC.clone() for name in POSITIONS}}

    def load_hf_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a Hugging Face checkpoint. Raises BardletError if they do not fit."""
        meta = self.position_TC.is_meta  # a meta tensor has no values to compare
        for name in POSITIONS:
            if (table := tensors.get(name)) is None:
                continue
            if table.shape != self.position_TC.shape or not (
                    meta or torch.allclose(table, self.position_TC.cpu(), atol=1e-5)):
                raise BardletError(f"'{name}' is not the sinusoids of this length; use transformers for this model")
        bias = tensors.get("final_logits_bias")
        if bias is not None and not bias.is_meta and bias.any():
            raise BardletError("the weights have a 'final_logits_bias', which bardlet does not support; "
                               "use transformers for this model")
        names = [name for name in tensors if name not in (*self.compared, *COPIES)]
        load_strictly(self, changed(names, tensors.__getitem__, tensors))


def sinusoids(length: int, width: int) -> Tensor:
    """Return position embeddings, sines and cosines of `width` / 2 frequencies: fp32 (length, width).

    Position p, frequency i: p / 10000^(2i / width) (Vaswani et al. 2017, section 3.5); here, all sines come first.
    """
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1).float()
