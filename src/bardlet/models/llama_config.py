"""The config.json of Llama and its relatives: written for transformers 4 and 5, read from either.

Each model type has its own defaults, which hold for entries that a file lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bardlet.config.model import LLAMA, ModelConfig, RopeScaling
from bardlet.errors import BardletError, Unsupported, printable
from bardlet.models.hf_config import check_supported, get_value

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
"""The beginning of the names of transformers' classes."""
THETA = {"smollm3": 2_000_000.0}
"""Rotary bases other than 10,000, where config.json has none."""
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "smollm3": 4}
"""Key-value heads, where config.json has no entry; a null, and llama without an entry, is one for each query head."""
MISTRAL_WINDOW = 4096
"""The sliding window of a Mistral whose config.json has no entry."""


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the model's part of config.json; the token ids come from the tokenizer.

    The rotary base appears twice: transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 reads
    `rope_parameters`.
    """
    scaling = config.rope_scaling
    rope = {"rope_type": "default"} if scaling is None else {
        "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.context}
    values = {
        "model_type": config.model,
        "architectures": [f"{CLASSES[config.model]}ForCausalLM"],
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
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,  # Hugging Face has no key for bardlet's dropout
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if scaling is not None:
        values["rope_scaling"] = rope
    if config.model != "llama":
        values["sliding_window"] = None
    if config.model in ("qwen2", "qwen3", "smollm3"):
        values |= {"use_sliding_window": False, "layer_types": ["full_attention"] * config.n_layer}
    if config.model in ("qwen2", "qwen3"):
        values["max_window_layers"] = config.n_layer
    if config.model in ("llama", "smollm3"):
        values["mlp_bias"] = False
    if config.model == "smollm3":
        without = config.layers_without_positions
        values |= {"no_rope_layers": [int(layer not in without) for layer in range(config.n_layer)]}
    return values


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of a config.json. Raises BardletError for settings that bardlet does not support."""
    check_supported(hf, "model_type", *LLAMA)
    model = get_value(hf, "model_type", str)
    for key in ("use_sliding_window", "mlp_bias"):
        check_supported(hf, key, False, None)
    if model in ("mistral", "qwen2"):
        check_supported(hf, "attention_bias", False, None)
    check_supported(hf, "hidden_act", "silu", "swish")
    block_size = get_value(hf, "max_position_embeddings", int)
    _check_windows(hf, model, block_size)
    theta, scaling = _rope(hf, model, block_size)
    n_layer = get_value(hf, "num_hidden_layers", int)
    n_embd, n_head = get_value(hf, "hidden_size", int), get_value(hf, "num_attention_heads", int)
    missing = KV_HEADS.get(model, n_head) if "num_key_value_heads" not in hf else n_head
    n_kv_head = get_value(hf, "num_key_value_heads", int, missing)
    if n_head % n_kv_head:
        raise BardletError(f"config.json: {n_head} query heads cannot share {n_kv_head} key-value heads evenly; "
                           "copy the file again")
    head_dim = get_value(hf, "head_dim", int, 128 if model == "qwen3" else max(1, n_embd // n_head))
    if head_dim % 2:
        raise BardletError(f"config.json: 'head_dim' is {head_dim}, but rotary positions need an even number; "
                           "copy the file again")
    return ModelConfig(
        model=model,
        vocab_size=get_value(hf, "vocab_size", int),
        block_size=block_size,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        head_dim=head_dim,
        n_inner=get_value(hf, "intermediate_size", int),
        tie_embeddings=get_value(hf, "tie_word_embeddings", bool, model == "smollm3"),
        activation="silu",
        norm_eps=get_value(hf, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        layers_without_positions=_without_positions(hf, n_layer) if model == "smollm3" else (),
        attention_bias=get_value(hf, "attention_bias", bool, False),
    )


def _check_windows(hf: Mapping[str, Any], model: str, block_size: int) -> None:
    """Raise Unsupported if attention sees a window that is shorter than the context."""
    window = hf.get("sliding_window", MISTRAL_WINDOW) if model == "mistral" else None  # others have a switch for it
    if window is not None and not (isinstance(window, int) and window >= block_size):
        raise Unsupported(f"config.json: a sliding window of {printable(window)} tokens ('sliding_window'), which "
                          "bardlet does not support; use transformers for this model")
    if any(kind != "full_attention" for kind in hf.get("layer_types") or []):
        raise Unsupported("config.json: 'layer_types' is not all full_attention; use transformers for this model")


def _rope(hf: Mapping[str, Any], model: str, block_size: int) -> tuple[float, RopeScaling | None]:
    """Return the rotary base and how the frequencies are scaled."""
    theta = get_value(hf, "rope_theta", float, THETA.get(model, 10_000.0))
    scaling = None
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and of 5
        rope = hf.get(key) or {}
        if not isinstance(rope, Mapping):
            raise BardletError(f"config.json: '{key}' is {printable(rope)}, but must be an object; copy the file again")
        theta = get_value(rope, "rope_theta", float, theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise Unsupported(f"config.json: '{key}': 'rope_type' is {printable(kind)}, but bardlet supports only "
                              "'default' or 'llama3'; use transformers for this model")
        check_supported(rope, "partial_rotary_factor", 1.0, None)
        if kind == "llama3":
            scaling = _llama3(rope, block_size)
    return theta, scaling


def _llama3(rope: Mapping[str, Any], block_size: int) -> RopeScaling:
    low, high = get_value(rope, "low_freq_factor", float), get_value(rope, "high_freq_factor", float)
    factor = get_value(rope, "factor", float)
    if not (low < high and factor >= 1):
        raise BardletError("config.json: a rotary scaling of 'llama3' needs a factor of at least 1, and a "
                           "'low_freq_factor' below its 'high_freq_factor'; copy the file again")
    return RopeScaling(factor, low, high, get_value(rope, "original_max_position_embeddings", int, block_size))


def _without_positions(hf: Mapping[str, Any], n_layer: int) -> tuple[int, ...]:
    """Return the layers of a SmolLM3 that have no rotary positions: by default every fourth."""
    rotates = hf.get("no_rope_layers")
    if rotates is None:
        every = get_value(hf, "no_rope_layer_interval", int, 4)
        rotates = [(layer + 1) % every for layer in range(n_layer)]
    if not isinstance(rotates, list) or len(rotates) != n_layer:
        raise BardletError(f"config.json: 'no_rope_layers' is {printable(rotates)}, but must be a list with a number "
                           f"for each of {n_layer} layers; copy the file again")
    return tuple(layer for layer, each in enumerate(rotates) if not each)
