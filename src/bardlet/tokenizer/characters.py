"""Characters as arrays of code points, for tokenizers of characters."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import numpy as np


def stand_in(alphabet: Iterable[str]) -> str:
    """Return the character of a char or byte tokenizer that other libraries use for padding and for unknown ones.

    Padding is masked, so any would do; but transformers leaves it out of a text that it decodes without special tokens,
    and a rare one does the least harm there.
    """
    characters = set(alphabet)
    return next((c for c in "\ufffd~^|`\\#*_$@&%+=<>{}[]/" if c in characters), max(characters))


def code_points(text: str) -> np.ndarray:
    """Return the code points of a text, uint32 of shape (characters,); lone surrogates pass (no alphabet has them)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def point_table(vocab: Mapping[str, int], special: Container[int]) -> np.ndarray:
    """Return the id of every code point, -1 for unseen ones: int32 of shape (0x110000,)."""
    table = np.full(0x110000, -1, np.int32)
    for char, i in vocab.items():
        if i not in special:
            table[ord(char)] = i
    return table
