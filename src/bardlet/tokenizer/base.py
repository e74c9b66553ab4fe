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
from bardlet.tokenizer.pieces import BATCH, PIECE, Place, batches, pieces
from bardlet.tokenizer.pipeline import BYTE_OF_CHAR, LOWERCASE, NFC, growth, kind_of

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
        pipeline = json.loads(self.inner.to_str())
        if (times := growth(pipeline.get("normalizer")) * growth(pipeline.get("decoder"))) > MAX_GROWTH:
            raise ValueError(f"can expand text {times:,} times")
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True
        self.json = text
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.special = {i: t.content for i, t in self.inner.get_added_tokens_decoder().items() if t.special}
        self.kind = kind_of(pipeline, len(self.vocab) - len(self.special))
        self.eos, self.pad = eos, PAD if self.kind in ("char", "byte") else pad
        self.chat_template: str | None = None
        self.eos_id: int | None = self.vocab.get(eos)
        self.pad_id: int | None = self.vocab.get(self.pad)
        # most vocabularies fit in 16 bits: half the disk space and memory traffic
        self.dtype = np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")
        self._ids_of_points = self._point_table() if self.kind == "char" else None
        self._bytes_of_id = self._byte_table()

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

    @cached_property
    def lowercase(self) -> bool:
        """True if the tokenizer lowercases its input."""
        return json.loads(self.json).get("normalizer") == LOWERCASE

    @cached_property
    def nfc(self) -> bool:
        """True if a char, byte or bpe tokenizer brings its input into Unicode's form NFC."""
        return self.kind != "other" and json.loads(self.json).get("normalizer") == NFC

    @cached_property
    def is_plain_bpe(self) -> bool:
        """True for a byte-level BPE with at most one of our normalizers: it cannot turn text into a special token."""
        return self.kind == "bpe" and json.loads(self.json).get("normalizer") in (None, LOWERCASE, NFC)

    def with_nfc(self) -> Tokenizer:
        """Return this tokenizer with NFC for its input; one with another normalizer, or of kind "other", as it is."""
        pipeline = json.loads(self.json)
        if self.kind == "other" or pipeline.get("normalizer"):
            return self
        pipeline["normalizer"] = NFC
        normal = Tokenizer(json.dumps(pipeline, ensure_ascii=False, indent=2), self.eos, self.pad)
        normal.chat_template = self.chat_template
        return normal

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
        grown = Tokenizer(json.dumps(pipeline, ensure_ascii=False, indent=2), self.eos, self.pad)
        grown.chat_template = self.chat_template
        return grown

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

        Memory holds a few blocks, but with kind "other" the whole text. A tokenizer with NFC needs blocks in that form.
        """
        place = Place()
        if self.kind == "other":  # its word boundaries are unknown, so the text cannot be split
            yield self._encode_whole("".join(blocks))
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

        BardletError if a text has a character that cannot be encoded; it does not say where. Not for the kind "other".
        """
        texts, place = [self.normalized(text) for text in texts], Place()
        if not texts:
            return np.zeros(0, self.dtype)
        if self.kind == "bpe":
            parts = self._encode_parts(list(texts), place)
            ids, lengths = np.concatenate(parts), [len(part) for part in parts]
        else:
            ids = self._look_up("".join(texts), place)
            lengths = [len(text) if self._ids_of_points is not None else len(text.encode()) for text in texts]
        return ids if separator is None else np.insert(ids, np.cumsum(lengths), separator)

    def normalized(self, text: str) -> str:
        """Return a text in the form that the tokenizer expects: NFC, if it was trained on that."""
        return unicodedata.normalize("NFC", text) if self.nfc and not text.isascii() else text

    def _encode_whole(self, text: str) -> np.ndarray:
        self._refuse_surrogates(text, Place())
        try:
            return np.array(self.inner.encode(text, add_special_tokens=False).ids, self.dtype)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, or panics in a regular expression
            raise BardletError(f"the model's tokenizer cannot encode the text ({one_line(error)}); "
                               "use the model's original tokenizer.json") from None

    def _encode_parts(self, batch: list[str], place: Place) -> list[np.ndarray]:
        try:
            encoded = self.inner.encode_batch_fast(batch, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # the library's errors for a lone surrogate
            self._refuse_surrogates("".join(batch), place)
            raise
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

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of ids. Invalid UTF-8 (a character cut in two) becomes U+FFFD."""
        if self._bytes_of_id is None:
            return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special))
        return b"".join(self.bytes_of(int(i), skip_special) for i in ids).decode("utf-8", "replace")

    def measure(self, ids: np.ndarray) -> tuple[int, int]:
        """Return (characters, bytes of UTF-8) of the text of ids (N,), without special tokens, in bounded memory.

        With kind "other", memory holds the whole text.
        """
        if self._bytes_of_id is None:
            text = self.decode(ids.tolist(), skip_special=True)
            return len(text), len(text.encode())
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        characters = size = 0
        for start in range(0, len(ids), PIECE * BATCH):
            part = ids[start : start + PIECE * BATCH].tolist()
            raw = b"".join(self.bytes_of(i, skip_special=True) for i in part)
            text = decoder.decode(raw, final=start + len(part) >= len(ids))
            characters, size = characters + len(text), size + len(text.encode())
        return characters, size

    def bytes_of(self, token: int, skip_special: bool = False) -> bytes:
        """Return the UTF-8 bytes of one token of a char, byte or bpe tokenizer."""
        if self._bytes_of_id is None or not 0 <= token < len(self._bytes_of_id):
            raise BardletError(f"token {token} is not in the vocabulary; ids must be from 0 to {self.vocab_size - 1}")
        return b"" if skip_special and token in self.special else self._bytes_of_id[token]

    def _byte_table(self) -> list[bytes] | None:
        if self.kind == "other":
            return None
        added = {i: t.content for i, t in self.inner.get_added_tokens_decoder().items()}
        table = [b""] * self.vocab_size
        for token, i in self.vocab.items():
            if self.kind == "char" or i in added:
                table[i] = token.encode()
            else:
                table[i] = bytes(BYTE_OF_CHAR[char] for char in token)
        return table

    def _point_table(self) -> np.ndarray:
        """Return the id of every code point, -1 for unseen ones: int32 of shape (0x110000,)."""
        table = np.full(0x110000, -1, np.int32)
        for char, i in self.vocab.items():
            if i not in self.special:
                table[ord(char)] = i
        return table

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
            "add_prefix_space": False,
            # decoder-only models have no token types: generate() fails if it gets them
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eos_id is not None:
            config["bos_token"] = config["eos_token"] = self.eos
        if self.padding is not None:
            config["pad_token"] = self.padding
            if self.kind != "other":  # as GPT-2 does: never written for a text, but CTranslate2 wants one
                config["unk_token"] = self.padding if self.eos_id is None else self.eos
        extra = [t for t in self.special.values() if t not in (self.eos, self.pad)]
        if extra:
            config["additional_special_tokens"] = extra
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config


MAX_QUOTES = 1 << 21
"""Maximum number of quotation marks in a tokenizer.json; Qwen3's, with 151,000 tokens, has under half of that."""
MAX_GROWTH = 1000
"""Maximum factor by which a tokenizer's rules may lengthen a text."""


# ------------------------------------------------------------------------------------------ helpers


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
