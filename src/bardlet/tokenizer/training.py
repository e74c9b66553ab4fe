"""New tokenizers: characters, bytes, or byte pairs trained on a text; and which of them suits a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bardlet.errors import BardletError
from bardlet.tokenizer.base import BPE_SPECIAL, BYTE_OF_SIGN, MIN_BPE_VOCAB, SEPARATOR, Tokenizer
from bardlet.tokenizer.pieces import PIECE, pieces

DISTINCT = 6_000_000
"""Bytes of different words that a BPE is trained on; the trainer needs about 100 bytes for each."""


def train_char(alphabet: Iterable[str], separator: bool) -> Tokenizer:
    """A token for each character of `alphabet`, ids in code point order; with `separator` one more for <|endoftext|>.

    WordLevel has no unknown token here: a character outside the alphabet is an error, never dropped.
    """
    characters = sorted(set(alphabet))
    if not characters:
        raise BardletError("the text has no characters: nothing to build a vocabulary from")
    inner = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return _finish(inner, separator)


def train_byte(separator: bool) -> Tokenizer:
    """A token for each byte, whose id is its value; with `separator` one more for <|endoftext|>. BPE without merges."""
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF_SIGN), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _finish(inner, separator)


def train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool = False, closed: bool = False) -> Tokenizer:
    """Byte-level BPE: six special tokens (ids 0 to 5), the 256 bytes, then merges, the most frequent first.

    lowercase: the tokenizer itself makes every text lower case. closed: transformers is to put <|endoftext|> behind
    each text that it encodes, as the models for translation of Hugging Face expect; `encode` never does.

    Reads `texts` until it has met DISTINCT bytes of different words (never, in spaced languages of a
    few hundred MB; soon, in text without spaces): that bounds the trainer's memory. Deterministic.
    A small text has fewer merges than asked for. BardletError when vocab_size cannot hold bytes and specials.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise BardletError(
            f"--vocab-size {vocab_size} is too small for bpe: at least {MIN_BPE_VOCAB} "
            f"(256 bytes and {len(BPE_SPECIAL)} special tokens), or --tokenizer byte"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    if lowercase:
        inner.normalizer = normalizers.Lowercase()
    if closed:
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {SEPARATOR}", pair=f"$A {SEPARATOR} $B {SEPARATOR}", special_tokens=[(SEPARATOR, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in BPE_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_until_distinct(texts), trainer)
    return Tokenizer(inner.to_str(pretty=True))


def _until_distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[int] = set()
    met = 0
    for text in texts:
        for piece in pieces(text):
            # a run that pieces() had to cut anywhere teaches little and costs much
            for part in (piece[i : i + PIECE] for i in range(0, len(piece), PIECE)):
                words = {hash(w): len(w) if w.isascii() else len(w.encode()) for w in set(part.split())}
                met += sum(words[h] for h in words.keys() - seen)
                seen.update(words)
                yield part
                if met > DISTINCT:
                    return


def choose_kind(characters: int, alphabet_size: int) -> tuple[str, int | None, str]:
    """`--tokenizer auto`: (kind, vocab_size for bpe or None, the reason as a sentence).

    characters: length of the text; alphabet_size: how many different characters it has.
    """
    size = f"{characters:,} characters, {alphabet_size:,} of them different"
    if alphabet_size <= 256 and characters < 4_000_000:
        return "char", None, f"char: {size}: a small alphabet and a small text, so every character is a token"
    if characters < 100_000:
        return "byte", None, f"byte: {size}: too many different ones for so short a text, so every byte is a token"
    vocab_size = suggest_vocab_size(characters, alphabet_size)
    why = "a long text" if alphabet_size <= 256 else "a large alphabet"
    return "bpe", vocab_size, f"bpe: {size}: {why}, so {vocab_size:,} tokens stand for its most frequent pieces"


def suggest_vocab_size(characters: int, alphabet_size: int) -> int:
    """A power of two near 2 * sqrt(characters), room for the alphabet, and every token seen some 200 times."""
    by_length = 2 ** round(math.log2(2 * math.sqrt(max(characters, 1))))
    by_alphabet = 2 ** math.ceil(math.log2(alphabet_size + MIN_BPE_VOCAB)) if alphabet_size > 256 else 0
    ceiling = 2 ** int(math.log2(max(characters / 200, 512)))
    return int(min(max(by_length, by_alphabet, 512), max(ceiling, by_length), 32_768))


def _finish(inner: tokenizers.Tokenizer, separator: bool) -> Tokenizer:
    if separator:
        inner.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return Tokenizer(inner.to_str(pretty=True))
