"""Fast decoders: a model's weights, packed once for decoding one token per row at a time.

The trainable models are the reference; a decoder computes the same in as few operations as torch allows, and tests
compare it with `forward`. There is one file per model family; `cache.py` holds the KV caches.
"""

from __future__ import annotations

from typing import Any

import torch

from bardlet.config.model import LLAMA
from bardlet.inference.decoders import encdec, gpt2, llama

DECODERS: dict[str, Any] = {"gpt2": gpt2.Decoder, **dict.fromkeys(LLAMA, llama.Decoder), "encdec": encdec.Decoder}
"""Decoder classes by model family."""


def decoder(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a decoder with the current weights of `model`; call this inside `torch.inference_mode`.

    Args:
        model: a model of a family in DECODERS, with a KV cache (`new_cache`).
        dtype: dtype of the decoder's weights; torch.int8 quantizes them (not for encdec); None: the model's own.
    """
    return DECODERS[model.config.model](model, dtype)
