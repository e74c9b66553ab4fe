"""Batched answers to chat prompts, with the stop tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bardlet.data.chat_template import end_ids
from bardlet.inference import generate
from bardlet.inference.drawing import Sampling
from bardlet.tokenizer import Tokenizer

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "seed": 0}
"""Sampling options for the samples on a model card."""

ROWS = 32
"""Answers generated at a time."""


def generate_answers(model: Any, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], tokens: int | None = None, *,
                     seed: int = 0, dtype: torch.dtype | None = None, temperature: float = 0.0,
                     **options: Any) -> list[tuple[str, bool]]:  # fmt: skip
    """Return (text, True if the answer ended with a stop token) for each prompt.

    Args:
        prompts: ids of conversations, (T,), up to where the answer begins.
        tokens: maximum length of an answer; None: whatever fits in the context window.
        options: those of `Sampling`; decoding is greedy by default.
    """
    max_tokens = [tokens or max(1, model.config.block_size - len(ids)) for ids in prompts]
    completions = generate.generate_each(model, [ids.tolist() for ids in prompts], max_tokens,
                                         Sampling(temperature=temperature, **options),
                                         seeds=[seed + i for i in range(len(prompts))], rows=ROWS,
                                         stop_ids=stop_ids(tokenizer), dtype=dtype)
    # ids above vocab_size pad the embedding table and have no text
    with_text = [[token for token in ids if token < tokenizer.vocab_size] for ids in completions]
    ends = end_ids(tokenizer)
    return [(tokenizer.decode(text, skip_special=True).strip(), bool(ids) and ids[-1] in ends)
            for ids, text in zip(completions, with_text, strict=True)]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: all special tokens, since a role token would start another speaker's turn."""
    return sorted({*tokenizer.special, *tokenizer.stop_ids})
