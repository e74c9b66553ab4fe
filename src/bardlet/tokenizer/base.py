"""The Tokenizer class: a `tokenizer.json` that encodes and decodes text."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bardlet.errors import BardletError, one_line
from bardlet.tokenizer.characters import code_points, point_table, stand_in
from bardlet.tokenizer.pieces import BATCH, PIECE, Place, batches, exact_pieces, pieces
from bardlet.tokenizer.pipeline import LOWERCASE, NFC, Cuts, cuts, growth, kind_of, prefix, token_bytes

log = logging.getLogger("bardlet")

KINDS = ("auto", "char", "byte", "bpe")  # values of --tokenizer

SEPARATOR = "<|endoftext|>"  # starts and ends a document
PAD = "<|pad|>"
END = "<|end|>"  # ends a message of a conversation
BPE_SPECIAL = (SEPARATOR, PAD, "<|system|>", "<|user|>", "<|assistant|>", END)
MIN_BPE_VOCAB = 256 + len(BPE_SPECIAL)


class Tokenizer:
    """A `tokenizer.json`: text to token ids and back.

    kind: "char", "byte", "bpe" (on bytes, with GPT-2's rule), or "other" (any other tokenizer).
    vocab_size: number of ids, special tokens included. hash: sha256 (hex) of the text of tokenizer.json.
    chat_template: the Jinja template of tokenizer_config.json; stored, but never run here.
    eos_id, pad_id: ids of <|endoftext|> (which also starts a document) and <|pad|>, or None.
    bos, unk: the tokens of a model from elsewhere that start a text and stand for unknown characters, or None.
    stop_ids: the ids that end a text; eos_id, and those that generation_config.json adds.
    rules: the content of tokenizer.json without the vocabulary and merges of its model.
    padding: the token that other libraries pad with, or None: <|pad|>, else <|endoftext|>, else a `stand_in`.
    """

    def __init__(self, text: str, eos: str = SEPARATOR, pad: str = PAD) -> None:
        """text: the content of a tokenizer.json. ValueError if the library rejects it, or if it exceeds our limits."""
        if text.count('"') > MAX_QUOTES:
            raise ValueError("more tokens than any known tokenizer")
        try:
            self.inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(str(error)) from error
        self.vocab = self.inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values(), default=0) + 1
        if self.vocab_size > 1 << 24:  # tables are indexed by id: one absurd id would exhaust memory
            raise ValueError(f"largest id {self.vocab_size - 1} is out of range")
        rules = json.loads(self.inner.to_str())
        if (times := growth(rules.get("normalizer")) * growth(rules.get("decoder"))) > MAX_GROWTH:
            raise ValueError(f"can expand text {times:,} times")
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True
        self.json = text
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.special = {i: t.content for i, t in self.inner.get_added_tokens_decoder().items() if t.special}
        self.kind = kind_of(rules, len(self.vocab) - len(self.special))
        self.eos, self.pad = eos, PAD if self.kind in ("char", "byte") else pad
        self.bos: str | None = eos
        self.unk: str | None = None
        self.chat_template: str | None = None
        self.eos_id: int | None = self.vocab.get(eos)
        self.pad_id: int | None = self.vocab.get(self.pad)
        self.stop_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)
        # most vocabularies fit in 16 bits: half the disk space and memory traffic
        self.dtype = np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")
        self._ids_of_points = point_table(self.vocab, self.special) if self.kind == "char" else None
        self.rules = rules | {"model": {k: v for k, v in rules["model"].items() if k not in ("vocab", "merges")}}
        self._strips, self._bytes_of_id = self._byte_table()

    @property
    def alphabet(self) -> str | None:
        """The characters of a char tokenizer in id order; None for the other kinds."""
        if self.kind != "char":
            return None
        return "".join(c for c, i in sorted(self.vocab.items(), key=lambda ci: ci[1]) if i not in self.special)

    @property
    def padding(self) -> str | None:
        """See the class."""
        if self.pad_id is not None:
            return self.pad
        if self.eos_id is not None:
            return self.eos
        return stand_in(self.vocab) if self.kind in ("char", "byte") else None

    @cached_property
    def added(self) -> list[str]:
        """The added tokens that are not special: they are matched in a text before it is split."""
        return [token.content for token in self.inner.get_added_tokens_decoder().values() if not token.special]

    @property
    def has_bytes(self) -> bool:
        """True if each token has bytes of its own, which joined are the text; a decoder may remove its first space."""
        return self._bytes_of_id is not None

    @property
    def bos_id(self) -> int | None:
        """The id of `bos`."""
        return self.vocab.get(self.bos or "")

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that begin a text, as transformers adds them by default: <s> of Llama 2. `encode` never does."""
        return prefix(self.rules)

    @cached_property
    def _cuts(self) -> Cuts | None:
        """Positions at which a text may be cut, for the kind "other"."""
        added = [token for token in self.rules["added_tokens"] if not token["special"]]
        return cuts(self.rules, self.vocab.keys() - set(self.special.values()), added)

    @cached_property
    def lowercase(self) -> bool:
        """True if the tokenizer lowercases its input."""
        return self.rules.get("normalizer") == LOWERCASE

    @cached_property
    def nfc(self) -> bool:
        """True if a char, byte or bpe tokenizer brings its input into Unicode's form NFC."""
        return self.kind != "other" and self.rules.get("normalizer") == NFC

    @cached_property
    def is_plain_bpe(self) -> bool:
        """True for a byte-level BPE with at most one of our normalizers: it cannot turn text into a special token."""
        byte_level = (self.rules.get("decoder") or {}).get("type") == "ByteLevel"
        return byte_level and self.rules["model"]["type"] == "BPE" and self.rules.get("normalizer") in (
            None, LOWERCASE, NFC)

    def with_nfc(self) -> Tokenizer:
        """Return this tokenizer with NFC for its input; one with another normalizer, or of kind "other", as it is."""
        pipeline = json.loads(self.json)
        if self.kind == "other" or pipeline.get("normalizer"):
            return self
        pipeline["normalizer"] = NFC
        return self._with(pipeline)

    def with_tokens(self, special: Iterable[str], characters: Iterable[str] = ()) -> Tokenizer:
        """Return this tokenizer with more tokens, whose ids follow the others; the ids of texts do not change.

        special: special tokens; those that exist are kept. characters: new characters of a char tokenizer.
        """
        pipeline, size = json.loads(self.json), self.vocab_size
        if new := sorted(set(characters) - set(self.vocab)):
            # the library numbers special tokens after the model's vocabulary, unless they are in it
            pipeline["model"]["vocab"].update({content: i for i, content in self.special.items()})
        for character in new:
            pipeline["model"]["vocab"][character] = size
            size += 1
        for token in special:
            if token not in self.special.values():
                pipeline["added_tokens"].append({"id": size, "content": token, "single_word": False, "lstrip": False,
                                                 "rstrip": False, "normalized": False, "special": True})
                size += 1
        return self._with(pipeline)

    def _with(self, pipeline: dict[str, Any]) -> Tokenizer:
        """Return a tokenizer with another tokenizer.json that has the same special tokens and template."""
        other = Tokenizer(json.dumps(pipeline, ensure_ascii=False, indent=2), self.eos, self.pad)
        for name in ("bos", "unk", "stop_ids", "chat_template"):
            setattr(other, name, getattr(self, name))
        return other

    # -- text to ids

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64 of shape (tokens,), same as transformers without special tokens.

        BardletError names the first unseen character (char) or lone surrogate and its position.
        """
        parts = list(self.encode_pieces(text))
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """Yield the result of encode() in consecutive parts of dtype self.dtype, in bounded memory."""
        return self.encode_blocks((text,))

    def encode_blocks(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in blocks, the same as of the whole text, in parts of dtype self.dtype.

        Memory holds a few blocks, but the whole text if the kind is "other" and its word boundaries are unknown. A
        tokenizer with NFC needs blocks in that form.
        """
        place = Place()
        if self.kind == "other":
            parts = exact_pieces(blocks, self._cuts.positions) if self._cuts else iter(("".join(blocks),))
            drops, is_later = self._cuts is not None and self._cuts.drops_space, False
            for batch in batches(parts, PIECE * BATCH):
                later = [piece[1:] if drops and (is_later or number) else piece for number, piece in enumerate(batch)]
                yield np.concatenate(self._encode_parts(later, place))
                is_later = True
                place.advance(batch)
        elif self.kind == "bpe":
            for batch in batches(pieces(map(self.normalized, blocks)), PIECE * BATCH):
                yield np.concatenate(self._encode_parts(batch, place))
                place.advance(batch)
        else:
            for block in map(self.normalized, blocks):
                for start in range(0, len(block), PIECE * BATCH):
                    piece = block[start : start + PIECE * BATCH]
                    yield self._look_up(piece, place)
                    place.advance((piece,))

    def encode_documents(self, texts: Sequence[str], separator: int | None) -> np.ndarray:
        """Return the ids of short texts one after the other, each followed by `separator`: (tokens,), self.dtype.

        With a separator, each begins with prefix_ids.
        BardletError if a text has a character that cannot be encoded; it does not say where.
        """
        texts, place = [self.normalized(text) for text in texts], Place()
        if not texts:
            return np.zeros(0, self.dtype)
        if self.kind in ("bpe", "other"):
            parts = self._encode_parts(list(texts), place)
            ids, lengths = np.concatenate(parts), [len(part) for part in parts]
        else:
            ids = self._look_up("".join(texts), place)
            lengths = [len(text) if self._ids_of_points is not None else len(text.encode()) for text in texts]
        if separator is None:
            return ids
        ends, first = np.cumsum(lengths), self.prefix_ids
        places = np.column_stack([*[ends - lengths] * len(first), ends])  # of equal places, the first comes first
        return np.insert(ids, places.ravel(), [*first, separator] * len(texts))

    def normalized(self, text: str) -> str:
        """Return a text in the form that the tokenizer expects: NFC, if it was trained on that."""
        return unicodedata.normalize("NFC", text) if self.nfc and not text.isascii() else text

    def _encode_parts(self, batch: list[str], place: Place) -> list[np.ndarray]:
        try:
            encoded = self.inner.encode_batch_fast(batch, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, or panics in a regular expression
            self._refuse_surrogates("".join(batch), place)
            raise BardletError(f"the model's tokenizer cannot encode the text ({one_line(error)}); "
                               "use the model's original tokenizer.json") from None
        return [np.array(e.ids, self.dtype) for e in encoded]

    def _look_up(self, piece: str, place: Place) -> np.ndarray:
        """Encode a piece at a place of a text by table, with the same ids as the library's pipeline (char and byte)."""
        if self._ids_of_points is not None:
            ids = self._ids_of_points[code_points(piece)]
            if ids.size and ids.min() < 0:
                self._refuse_unseen(piece, ids, place)
            return ids.astype(self.dtype)
        try:
            return np.frombuffer(piece.encode(), np.uint8).astype(self.dtype)
        except UnicodeEncodeError:
            self._refuse_surrogates(piece, place)
            raise

    def check(self, text: str) -> None:
        """Raise BardletError for the first character that this tokenizer does not know, with its position."""
        if self._ids_of_points is None:
            return self._refuse_surrogates(text, Place())
        text = self.normalized(text)
        ids = self._ids_of_points[code_points(text)]
        if ids.size and ids.min() < 0:
            self._refuse_unseen(text, ids, Place())

    def _refuse_unseen(self, text: str, ids: np.ndarray, place: Place) -> None:
        known = self.vocab_size - len(self.special)
        raise BardletError(
            f"{place.describe(text, int(np.flatnonzero(ids < 0)[0]))} is not among the {known} characters that the "
            "tokenizer knows; remove it, or train with --tokenizer byte or bpe, which encode any text"
        )

    def drop_unseen(self, text: str) -> tuple[str, int]:
        """Return (the text without the characters that check() rejects, number of these)."""
        text = self.normalized(text)
        if self._ids_of_points is None:
            kept = text.encode("utf-8", "ignore").decode()
        else:
            points = code_points(text)
            kept = points[self._ids_of_points[points] >= 0].astype("<u4").tobytes().decode("utf-32-le")
        return kept, len(text) - len(kept)

    def _refuse_surrogates(self, text: str, place: Place) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BardletError(
                f"{place.describe(text, error.start)} is half of a surrogate pair, not a character; "
                "save the text as UTF-8"
            ) from None

    # -- ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = False, continues: bool = False) -> str:
        """Return the text of ids. Invalid UTF-8 (a character cut in two) becomes U+FFFD.

        continues: the text goes on with another, so its first space stays, which SentencePiece removes from a text.
        """
        if self._bytes_of_id is None:
            return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special))
        raw = b"".join(self.bytes_of(int(i), skip_special) for i in ids)
        return (raw if continues else self.without_space(raw)).decode("utf-8", "replace")

    def without_space(self, raw: bytes) -> bytes:
        """Return the beginning of a text without the space that the decoder removes there."""
        return raw.removeprefix(b" ") if self._strips else raw

    def measure(self, ids: np.ndarray) -> tuple[int, int]:
        """Return (characters, bytes of UTF-8) of the text of ids (N,), without special tokens, in bounded memory.

        If tokens have no bytes of their own, memory holds the whole text.
        """
        if self._bytes_of_id is None:
            text = self.decode(ids.tolist(), skip_special=True)
            return len(text), len(text.encode())
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        characters = size = 0
        for start in range(0, len(ids), PIECE * BATCH):
            part = ids[start : start + PIECE * BATCH].tolist()
            raw = b"".join(self.bytes_of(i, skip_special=True) for i in part)
            raw = raw if start else self.without_space(raw)
            text = decoder.decode(raw, final=start + len(part) >= len(ids))
            characters, size = characters + len(text), size + len(text.encode())
        return characters, size

    def bytes_of(self, token: int, skip_special: bool = False) -> bytes:
        """Return the UTF-8 bytes of one token, if it `has_bytes`; a space that begins a text is part of its token."""
        if self._bytes_of_id is None or not 0 <= token < len(self._bytes_of_id):
            raise BardletError(f"token {token} is not in the vocabulary; ids must be from 0 to {self.vocab_size - 1}")
        return b"" if skip_special and token in self.special else self._bytes_of_id[token]

    def _byte_table(self) -> tuple[bool, list[bytes] | None]:
        """Return (True if the decoder removes a space from the start of a text, the bytes of each id)."""
        rule = None if self.kind == "char" else token_bytes(self.rules)
        if rule is None and self.kind != "char":
            return False, None
        added = {token["id"] for token in self.rules["added_tokens"]}
        table = [b""] * self.vocab_size
        for token, i in self.vocab.items():
            table[i] = token.encode() if rule is None or (rule.byte_level and i in added) else rule.of(token)
        return rule is not None and rule.strips, table

    # -- files

    def save(self, folder: str | Path, **settings: Any) -> None:
        """Write tokenizer.json and tokenizer_config.json for `AutoTokenizer.from_pretrained`.

        settings: more entries of tokenizer_config.json. model_max_length is the model's block_size, of which
        transformers warns; padding_side is "left" for a model that goes on with a text.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8", newline="\n")
        config = json.dumps(self.hf_config() | settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8", newline="\n")

    def hf_config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json."""
        config: dict[str, Any] = {
            # without a class, transformers picks one by model type, with other ids
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": (self.rules.get("pre_tokenizer") or {}).get("add_prefix_space") is True,
            # decoder-only models have no token types: generate() fails if it gets them
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.bos_id is not None:
            config["bos_token"] = self.bos
        if self.eos_id is not None:
            config["eos_token"] = self.eos
        if self.padding is not None:
            config["pad_token"] = self.padding
        if self.unk is not None:
            config["unk_token"] = self.unk
        elif self.padding is not None and self.kind != "other":
            # as GPT-2 does: never written for a text, but CTranslate2 wants one
            config["unk_token"] = self.padding if self.eos_id is None else self.eos
        extra = [t for t in self.special.values() if t not in (self.bos, self.eos, self.unk, self.pad)]
        if extra:
            config["additional_special_tokens"] = extra
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config


MAX_QUOTES = 1 << 21
"""Maximum number of quotation marks in a tokenizer.json; Qwen3's, with 151,000 tokens, has under half of that."""
MAX_GROWTH = 1000
"""Maximum factor by which a tokenizer's rules may lengthen a text."""
