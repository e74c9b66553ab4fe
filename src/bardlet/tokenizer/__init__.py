"""Text to token ids and back: characters, bytes or byte-pairs, each a plain `tokenizer.json`.

    char    every character that occurs in the text is a token (the lecture's tokenizer)
    byte    every byte of the UTF-8 text is a token: 256 of them write any text there is
    bpe     frequent runs of bytes are merged into longer tokens (Sennrich et al. 2016, arXiv:1508.07909;
            on bytes: Radford et al. 2019, section 2.2), with GPT-2's rule for where words begin

All three are `tokenizers` pipelines, so that transformers reads the very same file and gives the very
same ids. For characters and bytes a numpy table gives these ids too, much faster; a test holds the two
together. Text is always ordinary text here: "<|endoftext|>" typed by a person is thirteen characters.
"""

from __future__ import annotations

from bardlet.tokenizer.base import (
    BATCH,
    BPE_SPECIAL,
    END,
    KINDS,
    MIN_BPE_VOCAB,
    PAD,
    SEPARATOR,
    StreamDecoder,
    Tokenizer,
    code_points,
    load,
)
from bardlet.tokenizer.pieces import PIECE, pieces
from bardlet.tokenizer.training import choose_kind, suggest_vocab_size, train_bpe, train_byte, train_char

__all__ = [
    "BATCH",
    "BPE_SPECIAL",
    "END",
    "KINDS",
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
    "suggest_vocab_size",
    "train_bpe",
    "train_byte",
    "train_char",
]
