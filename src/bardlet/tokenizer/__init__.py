"""Tokenizers: characters, bytes or byte pairs, each stored as a plain `tokenizer.json`.

    char    one token per character that occurs in the text (the lecture's tokenizer)
    byte    one token per byte of UTF-8: 256 tokens encode any text
    bpe     frequent byte sequences are merged into longer tokens (Sennrich et al. 2016, arXiv:1508.07909;
            on bytes: Radford et al. 2019, section 2.2), split into words by GPT-2's rule

A model from elsewhere comes with a tokenizer of its own, the kind "other": byte pairs with another rule for words, as
Llama 3's, or pieces of SentencePiece with a fallback to bytes, as Llama 2's.

All are `tokenizers` pipelines: transformers reads the same file and gives the same ids. For characters and bytes
a numpy table gives the same ids much faster; a test compares the two. Text never becomes a special token:
"<|endoftext|>" typed by a user is thirteen characters.
"""

from __future__ import annotations

from bardlet.tokenizer.base import (
    BPE_SPECIAL,
    END,
    KINDS,
    MIN_BPE_VOCAB,
    PAD,
    SEPARATOR,
    Tokenizer,
)
from bardlet.tokenizer.characters import code_points
from bardlet.tokenizer.files import load
from bardlet.tokenizer.pieces import BATCH, PIECE, pieces
from bardlet.tokenizer.streaming import StreamDecoder
from bardlet.tokenizer.training import (
    MAX_ALPHABET,
    choose_kind,
    spread_sample,
    suggest_vocab_size,
    train_bpe,
    train_byte,
    train_char,
    with_stand_in,
)

__all__ = [
    "BATCH",
    "BPE_SPECIAL",
    "END",
    "KINDS",
    "MAX_ALPHABET",
    "MIN_BPE_VOCAB",
    "PAD",
    "PIECE",
    "SEPARATOR",
    "StreamDecoder",
    "Tokenizer",
    "choose_kind",
    "code_points",
    "load",
    "pieces",
    "spread_sample",
    "suggest_vocab_size",
    "train_bpe",
    "train_byte",
    "train_char",
    "with_stand_in",
]
