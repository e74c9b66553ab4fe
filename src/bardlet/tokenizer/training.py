"""Train character, byte and BPE tokenizers, and choose the kind that suits a text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bardlet.errors import BardletError
from bardlet.tokenizer.base import BPE_SPECIAL, MIN_BPE_VOCAB, SEPARATOR, Tokenizer
from bardlet.tokenizer.characters import stand_in
from bardlet.tokenizer.pieces import PIECE, pieces
from bardlet.tokenizer.pipeline import BYTE_OF_CHAR

DISTINCT = 6_000_000
"""Maximum total size of the distinct words for BPE training; the trainer needs about 100 bytes of memory per byte."""
SAMPLE, DISTINCT_OF_SAMPLE = 1 << 26, 1_500_000
"""Characters of the sample of a longer text, and the maximum total size of its distinct words."""
GOLDEN = (math.sqrt(5) - 1) / 2


def train_char(alphabet: Iterable[str], separator: bool) -> Tokenizer:
    """Return a tokenizer with one token per character of `alphabet`, in code point order.

    separator: add <|endoftext|>. `encode` refuses a character outside the alphabet; other libraries replace it by the
    stand-in (see `base.stand_in`).
    """
    characters = sorted(set(alphabet))
    if not characters:
        raise BardletError("no characters to build a vocabulary from; give a text that is not empty")
    vocab = {c: i for i, c in enumerate(characters)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=stand_in(characters)))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return _finish(inner, separator)


def train_byte(separator: bool) -> Tokenizer:
    """Return a tokenizer whose ids are byte values: BPE without merges. separator: add <|endoftext|>."""
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF_CHAR), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _finish(inner, separator)


def train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool = False, append_eos: bool = False,
              bounded: bool = False) -> Tokenizer:
    """Train a byte-level BPE: six special tokens (ids 0 to 5), the 256 bytes, then merges by frequency.

    lowercase: lowercase all input. append_eos: transformers appends <|endoftext|> to each text that it encodes, as
    Hugging Face's translation models expect; `encode` never does.

    Reads `texts` up to DISTINCT bytes of distinct words, which bounds the trainer's memory, or to the end if they are
    `bounded`, a `spread_sample`. Deterministic. A small text may give a smaller vocabulary. BardletError if vocab_size
    is too small for the bytes and special tokens.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise BardletError(
            f"--vocab-size {vocab_size}: must be at least {MIN_BPE_VOCAB} for bpe (256 bytes and "
            f"{len(BPE_SPECIAL)} special tokens); use --tokenizer byte for a smaller vocabulary"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    if lowercase:
        inner.normalizer = normalizers.Lowercase()
    if append_eos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {SEPARATOR}", pair=f"$A {SEPARATOR} $B {SEPARATOR}", special_tokens=[(SEPARATOR, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in BPE_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts if bounded else _until_distinct(texts), trainer)
    return Tokenizer(inner.to_str(pretty=True))


def _until_distinct(texts: Iterable[str]) -> Iterator[str]:
    words = _Words()
    for part in _parts(texts):
        words.add(part)
        yield part
        if words.size > DISTINCT:
            return


def _parts(texts: Iterable[str | Iterable[str]]) -> Iterator[str]:
    """Yield texts, which may come in blocks, in parts of at most PIECE characters."""
    for text in texts:
        for piece in pieces(text):
            # a long run without word starts teaches little and costs much
            yield from (piece[i : i + PIECE] for i in range(0, len(piece), PIECE))


class _Words:
    """The total size of the distinct words of a text, in bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._seen: set[int] = set()

    def add(self, text: str) -> None:
        """Count the words of the next part of a text."""
        words = {hash(w): len(w) if w.isascii() else len(w.encode()) for w in set(text.split())}
        self.size += sum(words[h] for h in words.keys() - self._seen)
        self._seen.update(words)


def spread_sample(read: Callable[[], Iterable[Iterable[str]]], characters: int,
                  distinct: int | None = None) -> Iterator[str]:
    """Yield the texts to train BPE on: all, or parts from everywhere in them if they have too many characters or words.

    Args:
        read: returns the texts, each in blocks; called several times.
        characters: of all texts.
        distinct: maximum total size of the distinct words, in bytes; None: DISTINCT.
    """
    share, limit = 1.0, distinct or DISTINCT
    if characters > SAMPLE:
        share, limit = SAMPLE / characters, min(limit, DISTINCT_OF_SAMPLE)
    while _distinct(_spread(read(), share), limit) > limit:
        share /= 2
    return _spread(read(), share)


def _distinct(parts: Iterable[str], limit: int) -> int:
    """Return the total size of the distinct words, or the first size above the limit."""
    words = _Words()
    for part in parts:
        words.add(part)
        if words.size > limit:
            break
    return words.size


def _spread(texts: Iterable[Iterable[str]], share: float) -> Iterator[str]:
    """Yield an evenly spread share of the parts of texts. The multiples of the golden ratio have no period."""
    for number, part in enumerate(_parts(texts)):
        if share == 1 or number * GOLDEN % 1 < share:
            yield part


MAX_ALPHABET = 256
"""Distinct characters up to which an alphabet counts as small: such a text may get a char tokenizer."""


def choose_kind(characters: int, alphabet_size: int) -> tuple[str, int | None, str]:
    """Choose the kind for `--tokenizer auto`: return (kind, vocab_size for bpe or None, reason).

    characters: length of the text; alphabet_size: number of distinct characters.
    """
    size = f"{alphabet_size:,} distinct character{'s' * (alphabet_size != 1)}"
    if alphabet_size <= MAX_ALPHABET and characters < 4_000_000:
        return "char", None, f"char: {size}; one token per character, for a small alphabet and a short text"
    if characters < 100_000:
        return "byte", None, f"byte: {size}; one token per byte, for a large alphabet and a short text"
    vocab_size = suggest_vocab_size(characters, alphabet_size)
    why = "a long text" if alphabet_size <= MAX_ALPHABET else "a large alphabet"
    return "bpe", vocab_size, f"bpe: {size}; {vocab_size:,} tokens, for {why}"


def suggest_vocab_size(characters: int, alphabet_size: int) -> int:
    """Return a power of two near 2 * sqrt(characters) that fits the alphabet, with about 200 occurrences per token."""
    by_length = 2 ** round(math.log2(2 * math.sqrt(max(characters, 1))))
    by_alphabet = 2 ** math.ceil(math.log2(alphabet_size + MIN_BPE_VOCAB)) if alphabet_size > 256 else 0
    ceiling = 2 ** int(math.log2(max(characters / 200, 512)))
    return int(min(max(by_length, by_alphabet, 512), max(ceiling, by_length), 32_768))


def with_stand_in(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer of characters in which other libraries replace unknown ones, as `train_char` makes it today.

    The ids of texts stay. bardlet 0.2 made tokenizers without; all others are returned as they are.
    """
    if tokenizer.kind != "char" or json.loads(tokenizer.json)["model"].get("unk_token") in tokenizer.vocab:
        return tokenizer
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    inner.model.unk_token = stand_in(tokenizer.alphabet or "")
    mended = Tokenizer(inner.to_str(pretty=True))
    mended.chat_template = tokenizer.chat_template
    return mended


def _finish(inner: tokenizers.Tokenizer, separator: bool) -> Tokenizer:
    if separator:
        inner.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return Tokenizer(inner.to_str(pretty=True))
