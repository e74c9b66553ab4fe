"""Completions of conversations: prompts from messages, sampling, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bardlet.data.chat_template import special_id
from bardlet.inference import generate
from bardlet.tokenizer import Tokenizer

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "seed": 0}
"""How a finished run answers on its card."""

ROWS = 32
"""Answers that are written at once."""


def generate_answers(model: Any, tokenizer: Tokenizer, asked: Sequence[np.ndarray], tokens: int | None = None, *, seed: int = 0,
            **options: Any) -> list[tuple[str, bool]]:  # fmt: skip
    """What a model answers: (text, whether it ended by itself) of each.

    Args:
        asked: ids of conversations, (T,), up to where an answer begins.
        tokens: at most so many for an answer; None: as many as the window has room for.
        options: of `generate.stream`; without any always the likeliest token.
    """
    stops = stop_ids(tokenizer)
    rooms = [tokens or max(1, model.config.block_size - len(ids)) for ids in asked]
    made: list[list[int]] = [[] for _ in asked]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))  # rows of one batch have similar lengths
    options = {"temperature": 0.0, **options}
    for first in range(0, len(order), ROWS):
        batch = order[first : first + ROWS]
        written = generate.generate(model, [asked[i].tolist() for i in batch], max(rooms[i] for i in batch),
                                    seed=[seed + i for i in batch], stop_ids=stops, **options)
        for i, ids in zip(batch, written, strict=True):
            made[i] = ids[: rooms[i]]  # whoever is beside it: an answer has its own room, and no more
    known = [[token for token in ids if token < tokenizer.vocab_size] for ids in made]  # spare rows mean nothing
    ends = (special_id(tokenizer, "end"), tokenizer.eos_id)
    return [(tokenizer.decode(text, skip_special=True).strip(), bool(ids) and ids[-1] in ends)
            for ids, text in zip(made, known, strict=True)]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Where an answer is over: at any special token, since what follows a role's would be somebody else's words."""
    return sorted(tokenizer.special)
