"""A tokenizer: a `tokenizer.json` that turns text into token ids and back, whole or piece by piece."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bardlet.errors import BardletError, one_line
from bardlet.runtime import manifest
from bardlet.tokenizer.pieces import PIECE, pieces

log = logging.getLogger("bardlet")

KINDS = ("auto", "char", "byte", "bpe")  # what --tokenizer accepts

SEPARATOR = "<|endoftext|>"  # begins and ends a document
PAD = "<|pad|>"
END = "<|end|>"  # ends a message of a conversation
BPE_SPECIAL = (SEPARATOR, PAD, "<|system|>", "<|user|>", "<|assistant|>", END)
MIN_BPE_VOCAB = 256 + len(BPE_SPECIAL)
LOWERCASE = {"type": "Lowercase"}  # the normalizer that a bpe may have

BATCH = 32  # pieces in flight; what bounds the memory of encoding


class Tokenizer:
    """A `tokenizer.json` with the ids of a text, the text of ids, and what is known about both.

    kind: "char", "byte", "bpe" (on bytes, GPT-2's rule), or "other" (any other file from elsewhere).
    vocab_size: number of ids, special tokens included. hash: sha256 (hex) of the text of tokenizer.json.
    chat_template: how tokenizer_config.json writes a conversation, in Jinja; it is kept, and never run here.
    eos_id, pad_id: ids of <|endoftext|> (it begins a text too) and <|pad|>, None where there is none.
    """

    def __init__(self, text: str, eos: str = SEPARATOR, pad: str = PAD) -> None:
        """text: the content of a tokenizer.json. ValueError when the library cannot read it, or it means harm."""
        if text.count('"') > MAX_QUOTES:
            raise ValueError("it has more words than any known one")
        try:
            self.inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(str(error)) from error
        self.vocab = self.inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values(), default=0) + 1
        if self.vocab_size > 1 << 24:  # ids index tables: one absurd id would take all memory
            raise ValueError(f"its largest id is {self.vocab_size - 1}")
        described = json.loads(self.inner.to_str())
        if (growth := _growth(described.get("normalizer")) * _growth(described.get("decoder"))) > MAX_GROWTH:
            raise ValueError(f"it may make a text {growth:,} times as long")
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True
        self.json = text
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.special = {i: t.content for i, t in self.inner.get_added_tokens_decoder().items() if t.special}
        self.eos, self.pad = eos, pad
        self.chat_template: str | None = None
        self.eos_id: int | None = self.vocab.get(eos)
        self.pad_id: int | None = self.vocab.get(pad)
        self.kind = _kind(described, len(self.vocab) - len(self.special))
        # 16 bits hold the ids of most vocabularies: half the disk and half the memory traffic
        self.dtype = np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")
        self._ids_of_points = self._point_table() if self.kind == "char" else None
        self._bytes_of_id = self._byte_table()

    @property
    def alphabet(self) -> str | None:
        """The characters of a char tokenizer in the order of their ids; None for the other kinds."""
        if self.kind != "char":
            return None
        return "".join(c for c, i in sorted(self.vocab.items(), key=lambda ci: ci[1]) if i not in self.special)

    @cached_property
    def lowercase(self) -> bool:
        """Whether capitals are made small before anything else."""
        return json.loads(self.json).get("normalizer") == LOWERCASE

    @cached_property
    def closed(self) -> bool:
        """Whether it is a bpe on bytes that at most makes a text lower case: what is no special token stays none."""
        return self.kind == "bpe" and json.loads(self.json).get("normalizer") in (None, LOWERCASE)

    # -- text to ids

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int64 of shape (tokens,), as transformers gives them, without special tokens.

        BardletError names an unseen character (char) or a lone surrogate and its place.
        """
        parts = list(self.encode_pieces(text))
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        """encode() in consecutive parts of type self.dtype, in bounded memory however long the text is."""
        if self.kind == "other":  # nothing is known about where its words begin
            self._refuse_surrogates(text)
            try:
                yield np.array(self.inner.encode(text, add_special_tokens=False).ids, self.dtype)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a bare one of the library, or the panic of its regular expressions
                raise BardletError(f"the tokenizer of this model cannot read the text ({one_line(error)}); "
                                   "take the model's own tokenizer.json") from None
        elif self.kind == "bpe":
            batch: list[str] = []
            room = PIECE * BATCH  # counted in characters: a text without spaces has longer pieces
            for piece in pieces(text):
                batch.append(piece)
                room -= len(piece)
                if room <= 0:
                    yield self._encode_batch(batch, text)
                    batch, room = [], PIECE * BATCH
            if batch:
                yield self._encode_batch(batch, text)
        else:
            for start in range(0, len(text), PIECE * BATCH):
                yield self._look_up(text[start : start + PIECE * BATCH], text)

    def _encode_batch(self, batch: list[str], whole: str) -> np.ndarray:
        try:
            encoded = self.inner.encode_batch_fast(batch, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # how the library refuses a lone surrogate
            self._refuse_surrogates(whole)
            raise
        return np.concatenate([np.array(e.ids, self.dtype) for e in encoded])

    def _look_up(self, piece: str, whole: str) -> np.ndarray:
        """The ids of characters or bytes: what the library's pipeline gives, from a table."""
        if self._ids_of_points is not None:
            ids = self._ids_of_points[code_points(piece)]
            if ids.size and ids.min() < 0:
                self.check(whole)
            return ids.astype(self.dtype)
        try:
            return np.frombuffer(piece.encode(), np.uint8).astype(self.dtype)
        except UnicodeEncodeError:
            self._refuse_surrogates(whole)
            raise

    def check(self, text: str) -> None:
        """BardletError naming the first character that this tokenizer has never seen, and its place."""
        if self._ids_of_points is None:
            return self._refuse_surrogates(text)
        unseen = np.flatnonzero(self._ids_of_points[code_points(text)] < 0)
        if unseen.size:
            known = self.vocab_size - len(self.special)
            raise BardletError(
                f"{_describe(text, int(unseen[0]))} is not one of the {known} characters that this model "
                "has seen: leave it out, or train with --tokenizer byte or bpe, which write any text"
            )

    def drop_unseen(self, text: str) -> tuple[str, int]:
        """(the text without the characters that check() would name, how many there were)."""
        if self._ids_of_points is None:
            kept = text.encode("utf-8", "ignore").decode()
        else:
            points = code_points(text)
            kept = points[self._ids_of_points[points] >= 0].astype("<u4").tobytes().decode("utf-32-le")
        return kept, len(text) - len(kept)

    def _refuse_surrogates(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BardletError(
                f"{_describe(text, error.start)} is half of a surrogate pair, not a character: "
                "the text was decoded wrongly; save it as UTF-8"
            ) from None

    # -- ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        if self._bytes_of_id is None:
            return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special))
        return b"".join(self.bytes_of(int(i), skip_special) for i in ids).decode("utf-8", "replace")

    def bytes_of(self, token: int, skip_special: bool = False) -> bytes:
        """The UTF-8 bytes that one token of a char, byte or bpe tokenizer stands for."""
        if self._bytes_of_id is None or not 0 <= token < len(self._bytes_of_id):
            raise BardletError(f"there is no token {token} in this tokenizer's vocabulary of {self.vocab_size}")
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
                table[i] = bytes(BYTE_OF_SIGN[sign] for sign in token)
        return table

    def _point_table(self) -> np.ndarray:
        """id of every code point, -1 where there is none; int32 of shape (0x110000,)."""
        table = np.full(0x110000, -1, np.int32)
        for char, i in self.vocab.items():
            if i not in self.special:
                table[ord(char)] = i
        return table

    # -- files

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` reads.

        model_max_length: the model's block_size; transformers warns when a text is longer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8", newline="\n")
        config = json.dumps(self.hf_config(model_max_length), indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8", newline="\n")

    def hf_config(self, model_max_length: int | None = None) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        config: dict[str, Any] = {
            # without the class transformers builds one of its own for the model type, with other ids
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            "padding_side": "right",
            # decoder-only models know no token types; generate() would stumble over them
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.eos_id is not None:
            config["bos_token"] = config["eos_token"] = self.eos
        if self.pad_id is not None:
            config["pad_token"] = self.pad
        extra = [t for t in self.special.values() if t not in (self.eos, self.pad)]
        if extra:
            config["additional_special_tokens"] = extra
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config


MAX_QUOTES = 1 << 21
"""Quotation marks in the largest tokenizer.json that is read; that of Qwen3, with 151,000 tokens, has under half."""
MAX_GROWTH = 1000
"""How many times as long a text may become by the rules of a tokenizer."""
MAX_TOKENIZER_BYTES = 1 << 25
"""Bytes of the largest tokenizer.json that is read; that of Qwen3, with 151,000 tokens, has a third of it."""


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder. BardletError when tokenizer.json is missing or damaged."""
    path = manifest.inside(Path(folder), "tokenizer.json")
    if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
        raise BardletError(f"{path}: damaged: {size:,} bytes are too many for a tokenizer; copy it again")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BardletError(f"{path}: cannot be read ({reason}); a model folder needs its tokenizer.json") from None
    names = {"eos": SEPARATOR, "pad": PAD}
    beside = path.with_name("tokenizer_config.json")
    config = manifest.read_json(beside) if os.path.lexists(beside) else {}
    for key in names:
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        names[key] = token if isinstance(token, str) else names[key]
    try:
        tokenizer = Tokenizer(text, **names)
    except (ValueError, KeyError, TypeError) as error:
        raise BardletError(f"{path}: is damaged ({one_line(error)}); copy it again from where it came") from None
    template, alone = config.get("chat_template"), path.with_name("chat_template.jinja")
    if template is None and alone.is_file() and alone.stat().st_size <= MAX_TOKENIZER_BYTES:  # where transformers writes it
        template = alone.read_text(encoding="utf-8", errors="replace")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


# ---------------------------------------------------------------------------------------- streaming


class StreamDecoder:
    """Tokens in one by one, text out as soon as it is whole: never half a character.

    The texts of feed() and finish() joined are decode() of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # kind "other": what has been fed, and how much of its text is out
        self._sent = ""

    def feed(self, token: int) -> str:
        """The text that became certain with this token; often "" in the middle of a character."""
        if self.tokenizer.kind != "other":
            return self._utf8.decode(self.tokenizer.bytes_of(int(token), self.skip_special))
        self._ids.append(int(token))
        text = self.tokenizer.decode(self._ids, self.skip_special)
        return "" if text.endswith("\ufffd") else self._send(text)

    def finish(self) -> str:
        """What is left at the end: U+FFFD where the last character was never completed."""
        if self.tokenizer.kind != "other":
            return self._utf8.decode(b"", final=True)
        return self._send(self.tokenizer.decode(self._ids, self.skip_special))

    def _send(self, text: str) -> str:
        new, self._sent = text[len(self._sent) :], text
        return new


# ------------------------------------------------------------------------------------------ helpers


def _byte_of_sign() -> dict[str, int]:
    """GPT-2's printable sign for each byte: itself where it prints, else the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_SIGN = _byte_of_sign()


def _growth(rules: Any) -> int:
    """How many times as long a text can become by the replacements of a normalizer or a decoder."""
    if isinstance(rules, list):
        return math.prod(map(_growth, rules))
    if not isinstance(rules, dict):
        return 1
    return max(1, len(str(rules.get("content", rules.get("prepend", ""))))) * math.prod(map(_growth, rules.values()))


def _kind(data: dict[str, Any], ordinary: int) -> str:
    """Which of our pipelines a tokenizer.json is; ordinary: how many tokens are not special."""
    model, before, after = data["model"], data.get("pre_tokenizer") or {}, data.get("decoder") or {}
    lowercase = data.get("normalizer") == LOWERCASE and model["type"] == "BPE" and before.get("use_regex")
    if data.get("normalizer") and not lowercase:
        return "other"
    if model["type"] == "WordLevel":
        single = all(len(token) == 1 for token in model["vocab"]) and after.get("type") == "Fuse"
        return "char" if single and before.get("pattern") == {"Regex": r"[\s\S]"} else "other"
    on_bytes = before.get("type") == after.get("type") == "ByteLevel" and not before["add_prefix_space"]
    if model["type"] != "BPE" or not on_bytes:
        return "other"
    if before["use_regex"]:
        return "bpe"
    return "byte" if not model["merges"] and ordinary == 256 and model["vocab"] == BYTE_OF_SIGN else "other"


def code_points(text: str) -> np.ndarray:
    """Code points, uint32 of shape (characters,); lone surrogates pass (no alphabet has them)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _describe(text: str, index: int) -> str:
    """A character and its place, for people: line and column from 1, as editors count."""
    char = text[index]
    line = text.count("\n", 0, index) + 1
    column = index - text.rfind("\n", 0, index)
    shown = f'"{char}"' if char.isprintable() else "a character that does not print"
    return f"{shown} (U+{ord(char):04X}) at line {line}, column {column}"
