"""Weights of every model family by one set of names, for a program that runs all of them.

    embed positions blocks.N.{norm1 q k v qNorm kNorm o crossNorm crossQ crossK crossV crossO norm2 gate up down}
    encoder.N.{...} encoder.norm norm head

Each has a weight and maybe a bias. Matrices are (outputs, inputs), `embed` is (V, C). A rung without blocks has its one
layer in blocks.0. A model without a layer has no weight of its name. `web/forward.js` reads this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bardlet.config.model import LLAMA, ROTARY, RUNGS, WITHOUT_BLOCKS
from bardlet.errors import BardletError
from bardlet.models.layers import rope_frequencies

PARTS = {
    "gpt2": {"ln_1": "norm1", "attn.c_proj": "o", "ln_2": "norm2", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    "llama": {"input_layernorm": "norm1", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
              "self_attn.q_norm": "qNorm", "self_attn.k_norm": "kNorm", "self_attn.o_proj": "o",
              "post_attention_layernorm": "norm2", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
              "mlp.down_proj": "down"},
    "encdec": {"self_attn_layer_norm": "norm1", "self_attn.q_proj": "q", "self_attn.k_proj": "k",
               "self_attn.v_proj": "v", "self_attn.out_proj": "o", "encoder_attn_layer_norm": "crossNorm",
               "encoder_attn.q_proj": "crossQ", "encoder_attn.k_proj": "crossK", "encoder_attn.v_proj": "crossV",
               "encoder_attn.out_proj": "crossO", "final_layer_norm": "norm2", "fc1": "up", "fc2": "down"},
    "rung": {"ln1": "norm1", "sa.query": "q", "sa.key": "k", "sa.value": "v", "sa.query_norm": "qNorm",
             "sa.key_norm": "kNorm", "sa.proj": "o", "ln2": "norm2", "ffwd.net.0": "up", "ffwd.net.2": "down",
             "ffwd.gate": "gate", "ffwd.up": "up", "ffwd.down": "down"},
}
"""Names of the layers of a block, by family; the rungs share theirs."""

OUTSIDE = {
    "wte": "embed", "wpe": "positions", "ln_f": "norm", "lm_head": "head", "embed_tokens": "embed", "norm": "norm",
    "shared": "embed", "decoder.layer_norm": "norm", "encoder.layer_norm": "encoder.norm",
    "token_embedding_table": "embed", "position_embedding_table": "positions",
}
"""Names of the layers outside the blocks, of all families."""


def weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model by their canonical names, on the CPU, in float32."""
    name = model.config.model
    family = "rung" if name in RUNGS else "llama" if name in LLAMA else name
    named: dict[str, Tensor] = {}
    heads: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.removeprefix("transformer.").removeprefix("model.").rpartition(".")
        stack, part = _split(layer)
        tensor = tensor.detach().float().cpu()
        if stack is None:
            named[f"{OUTSIDE[part]}.{kind}"] = tensor
        elif part == "attn.c_attn":  # gpt2 computes query, key and value by one matrix
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{stack}.{letter}.{kind}"] = third.contiguous()
        elif ".heads." in f".{part}":  # the first rungs have a matrix for each head
            letter = {"query": "q", "key": "k", "value": "v"}[part.rpartition(".")[2]]
            heads.setdefault(f"{stack}.{letter}.{kind}", []).append(tensor)
        else:
            named[f"{stack}.{PARTS[family][part]}.{kind}"] = tensor
    return named | {name: torch.cat(tensors) for name, tensors in heads.items()}


def _split(layer: str) -> tuple[str | None, str]:
    """Return (canonical name of the block, name inside it), or (None, name) of a layer outside the blocks."""
    words = layer.split(".")
    for prefix, stack in (("h", "blocks"), ("layers", "blocks"), ("blocks", "blocks"), ("decoder.layers", "blocks"),
                          ("encoder.layers", "encoder")):
        length = prefix.count(".") + 1
        if words[:length] == prefix.split(".") and len(words) > length:
            return f"{stack}.{words[length]}", ".".join(words[length + 1:])
    if words[0] in ("sa_head", "sa_heads", "ffwd"):  # a rung without blocks
        return "blocks.0", ".".join(["sa" if words[0] != "ffwd" else "ffwd", *words[1:]])
    return None, layer


def check(model: Any) -> None:
    """Raise BardletError for a model that `web/forward.js` cannot run."""
    if model.config.scores:
        raise BardletError("a reward model gives scores, not text; export the model that it judges")


def describe(model: Any, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what `web/forward.js` must know besides the weights. named: `weights(model)`."""
    c = model.config
    rung = c.model in RUNGS
    rotary = c.model in LLAMA or c.model in ROTARY
    frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling).tolist() if rotary else []
    return {
        "family": c.model, "vocab": c.vocab_size, "channels": named["embed.weight"].shape[1], "context": c.block_size,
        "layers": 1 if c.model in WITHOUT_BLOCKS[1:] else 0 if c.model == "bigram" else c.n_layer,
        "encoderLayers": c.n_encoder_layer, "heads": 1 if c.model == "one-head" else c.n_head,
        "kvHeads": 1 if c.model == "one-head" else c.n_kv_head,
        "headSize": c.n_embd if c.model == "one-head" else c.head_dim,
        "attention": {"bigram": None, "averaging": "average"}.get(c.model, "softmax"),
        "positions": "rotary" if rotary else "sinusoids" if c.model == "encdec" else
                     "learned" if "positions.weight" in named else None,
        "frequencies": frequencies, "withoutPositions": list(c.layers_without_positions),
        "activation": "silu" if "blocks.0.gate.weight" in named else "relu" if rung else c.activation,
        "residual": c.model not in WITHOUT_BLOCKS, "slides": rung,
        "eps": c.norm_eps if rotary or not rung else 1e-5,  # the lecture's LayerNorm has PyTorch's default
        "centered": any(name.endswith("norm1.bias") for name in named),  # a LayerNorm; an RMSNorm has no bias
        "embeddingScale": math.sqrt(c.n_embd) if c.model == "encdec" and c.scale_embedding else 1.0,
        "head": "none" if c.model == "bigram" else "own" if "head.weight" in named else "tied",
        "shapes": {name: list(tensor.shape) for name, tensor in named.items()},
    }
