"""Fast decoders: a model's weights packed once, for one more token a row at a time.

The trainable models say what is computed; a decoder computes the same in as few operations as torch allows, and tests
hold it to `forward`. Each family has a file of its own; `cache.py` has the keys and values that they read.
"""

from __future__ import annotations

from typing import Any

import torch

from bardlet.inference.decoders import encdec, gpt2, qwen3

DECODERS: dict[str, Any] = {"gpt2": gpt2.Decoder, "qwen3": qwen3.Decoder, "encdec": encdec.Decoder}
"""By model family."""


def decoder(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the decoder of `model`, its weights as they are now; call it inside `torch.inference_mode`.

    Args:
        model: a model of one of the families in DECODERS, with a cache (`new_cache`).
        dtype: of the decoder's weights; torch.int8 rounds them (gpt2, qwen3); None: as they are.
    """
    return DECODERS[model.config.model](model, dtype)
