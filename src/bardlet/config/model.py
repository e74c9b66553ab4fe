"""The shape of a model. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WITHOUT_BLOCKS = ("bigram", "averaging", "one-head", "multi-head", "feed-forward")
"""Rungs of the ladder without Transformer blocks."""

ROTARY = ("rotary", "swiglu", "qk-norm")
"""Rungs of the ladder with rotary positions, RMSNorm and no biases."""

RUNGS = (*WITHOUT_BLOCKS, "residual", "layer-norm", "dropout", *ROTARY)
"""The models of the ladder, in its order."""

LLAMA = ("qwen3", "llama", "mistral", "qwen2", "smollm3")
"""Families of `models/llama.py`; Hugging Face gives each of them a model type of its own."""

WITHOUT_HEADS = ("bigram", "averaging", "one-head")
"""Rungs of the ladder whose channels are not split into heads."""

MAX_SINUSOIDS = 2**16
"""Maximum context of an encoder-decoder, in tokens: the table of positions is built in full."""

Activation = Literal["gelu_new", "gelu", "relu"]


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies of Llama 3.1, for a context longer than that of pretraining (`layers.rope_cos_sin`)."""

    factor: float
    """Slow channel pairs turn slower by this factor."""
    low: float
    """A pair with fewer turns than this within `context` is slow."""
    high: float
    """A pair with more turns than this keeps its frequency; those between are interpolated."""
    context: int
    """The context of pretraining, in tokens."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: with its weights, enough to compute logits."""

    model: str
    """gpt2, encdec, one of LLAMA or a rung of the ladder."""
    vocab_size: int
    block_size: int = 256
    """The context window, in tokens."""
    n_layer: int = 6
    n_encoder_layer: int = 0
    """Encoder blocks (encdec only, where n_layer counts decoder blocks)."""
    n_head: int = 6
    n_kv_head: int = 6
    """Key and value heads; fewer than n_head is grouped-query attention (LLAMA only)."""
    n_embd: int = 384
    head_dim: int = 64
    """Channels per head: n_embd // n_head unless a Hugging Face folder says otherwise (LLAMA only)."""
    n_inner: int = 1536
    """Width of the feed-forward layer."""
    dropout: float = 0.0
    tie_embeddings: bool = True
    """Share the matrix of the token embedding with the output head."""
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (LLAMA, and the rungs from `rotary` on)."""
    rope_scaling: RopeScaling | None = None
    layers_without_positions: tuple[int, ...] = ()
    """Layers that do not rotate queries and keys (smollm3 only)."""
    attention_bias: bool = False
    """Biases on the four matrices of attention (LLAMA only; qwen2 always has three of them)."""
    scale_embedding: bool = True
    """Multiply the token embeddings by sqrt(n_embd), as in the paper (encdec only; foreign folders may not)."""
    scores: bool = False
    """A scalar head instead of the head over the vocabulary: a reward model (gpt2, LLAMA)."""
