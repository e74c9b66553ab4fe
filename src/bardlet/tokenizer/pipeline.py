"""Properties of a `tokenizer.json`, from its content.

Its kind, how much it can lengthen a text, the bytes of its tokens, the tokens that begin a text, and the positions at
which a text may be cut.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

LOWERCASE, NFC = {"type": "Lowercase"}, {"type": "NFC"}  # the normalizers of bardlet's tokenizers: at most one


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's byte-to-unicode table, inverted: printable bytes are themselves, the others U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def kind_of(pipeline: dict[str, Any], ordinary: int) -> str:
    """Return the kind of a tokenizer.json; ordinary: number of tokens that are not special."""
    model, pre, decoder = pipeline["model"], pipeline.get("pre_tokenizer") or {}, pipeline.get("decoder") or {}
    lowercase = pipeline.get("normalizer") == LOWERCASE and model["type"] == "BPE" and pre.get("use_regex")
    if pipeline.get("normalizer") not in (None, NFC) and not lowercase:
        return "other"
    if model["type"] == "WordLevel":
        special = {token["content"] for token in pipeline["added_tokens"] if token["special"]}
        single = all(len(token) == 1 for token in set(model["vocab"]) - special) and decoder.get("type") == "Fuse"
        return "char" if single and pre.get("pattern") == {"Regex": r"[\s\S]"} else "other"
    on_bytes = pre.get("type") == decoder.get("type") == "ByteLevel" and not pre["add_prefix_space"]
    if model["type"] != "BPE" or not on_bytes:
        return "other"
    if pre["use_regex"]:
        return "bpe"
    return "byte" if not model["merges"] and ordinary == 256 and model["vocab"] == BYTE_OF_CHAR else "other"


def growth(rules: Any) -> int:
    """Return an upper bound on how many times a normalizer or decoder can lengthen a text by its replacements."""
    if isinstance(rules, list):
        return math.prod(map(growth, rules))
    if not isinstance(rules, dict):
        return 1
    return max(1, len(str(rules.get("content", rules.get("prepend", ""))))) * math.prod(map(growth, rules.values()))


# ---------------------------------------------------------------- the bytes of tokens

SPACE = "\u2581"
"""The character that stands for a space in the tokens of SentencePiece."""
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_TO_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_BYTES = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for char, byte in BYTE_OF_CHAR.items()}
"""From the characters that stand for bytes to Latin-1; to another character from the rest of Latin-1."""


class TokenBytes:
    """The UTF-8 bytes of tokens, for a decoder that joins them.

    strips: True if the decoder removes a space from the start of a text.
    """

    def __init__(self, byte_level: bool, strips: bool) -> None:
        self.byte_level, self.strips = byte_level, strips

    def of(self, token: str) -> bytes:
        """Return the bytes of a token: "\u0120a" of a byte-level BPE, or "\u2581a" and "<0xC3>" of SentencePiece."""
        if self.byte_level:
            try:
                return token.translate(_BYTES).encode("latin-1")
            except UnicodeEncodeError:  # an added token
                return token.encode()
        return bytes([int(token[3:5], 16)]) if _BYTE.fullmatch(token) else token.replace(SPACE, " ").encode()


def token_bytes(pipeline: dict[str, Any]) -> TokenBytes | None:
    """Return the rule for the bytes of tokens, or None if the text of a token depends on others in another way."""
    rules = steps(pipeline.get("decoder"), "decoders")
    if [rule["type"] for rule in rules] == ["ByteLevel"]:
        return TokenBytes(byte_level=True, strips=False)
    if [rule["type"] for rule in rules[:3]] != ["Replace", "ByteFallback", "Fuse"] or rules[0] != _TO_SPACE:
        return None
    return TokenBytes(byte_level=False, strips=bool(rules[3:])) if rules[3:] in ([], [_STRIP]) else None


def steps(rules: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer, decoder or post-processor; a sequence has them under `name`."""
    if not isinstance(rules, dict):
        return []
    if rules.get("type") != "Sequence":
        return [rules]
    return [step for each in rules[name] for step in steps(each, name)]


def prefix(pipeline: dict[str, Any]) -> list[int]:
    """Return the ids that the post-processor puts before a text, as <s> of Llama 2."""
    for step in steps(pipeline.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            before = itertools.takewhile(lambda part: "SpecialToken" in part, step["single"])
            return [i for part in before for i in step["special_tokens"][part["SpecialToken"]["id"]]["ids"]]
    return []


def start_only(pipeline: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps that put a space before a text, but not before the part of it that follows a special token."""
    found = steps(pipeline.get("pre_tokenizer"), "pretokenizers")
    return [step for step in found if step["type"] == "Metaspace" and step["prepend_scheme"] == "first"]


# ---------------------------------------------------------------- cuts that keep the ids


@dataclass(frozen=True)
class Cuts:
    """Positions at which a text may be cut, so that its parts have the ids of the whole text.

    positions: matches at each of them. drops_space: leave out the space with which a later part begins, because the
    tokenizer puts one before each text.
    """

    positions: re.Pattern[str]
    drops_space: bool = False


_IN_WORDS = re.compile(r"(?<=[\w!-~])(?= )|"
                       r"(?<=[A-Za-z0-9\u4e00-\u9fa5])(?=[\n.,;:!?\u3001\u3002\uff0c\uff1b])")
_BEFORE_WORDS = re.compile(rf"(?<=[^\s{SPACE}])(?= \w)")
_INSIDE = re.compile(rf"[^{SPACE}]{SPACE}")
"""A token that a merge makes across the beginning of a word."""
_GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
"""The words of Qwen2; those of Llama 3 have numbers of up to three digits."""
SPLITS = [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
           for rule in (_GPT4, _GPT4.replace(r"\p{N}|", r"\p{N}{1,3}|"))]
_LEGACY = [{"type": "Prepend", "prepend": SPACE},
           {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def cuts(pipeline: dict[str, Any], tokens: Collection[str], added: Sequence[dict[str, Any]]) -> Cuts | None:
    """Return where a text may be cut, or None if that is not known for this pipeline.

    tokens: the vocabulary of the model. added: the added tokens that are matched in a text, as in tokenizer.json.
    """
    model = pipeline["model"]
    if model["type"] != "BPE" or model["dropout"]:
        return None
    if not all(_is_plain(token) for token in added):
        return None
    if found := _word_cuts(pipeline):
        return found
    parts_of_words = model["ignore_merges"] or model["end_of_word_suffix"] or model["continuing_subword_prefix"]
    if parts_of_words or any(token["normalized"] for token in added):
        return None
    return _sentencepiece_cuts(pipeline, tokens)


def _is_plain(token: dict[str, Any]) -> bool:
    """Return True if an added token neither reads white space around it, nor begins or contains a word start."""
    content = token["content"]
    return not (token["lstrip"] or token["rstrip"] or token["single_word"]
                or re.match(r"[\w\s]", content) or re.search(r"\S[\s.,;:!?\u3001\u3002\uff0c\uff1b]", content))


def _word_cuts(pipeline: dict[str, Any]) -> Cuts | None:
    """Return the cuts of a byte-level BPE, whose words end before a space, whatever follows."""
    found = steps(pipeline.get("pre_tokenizer"), "pretokenizers")
    if any(step != {"type": "NFC"} for step in steps(pipeline.get("normalizer"), "normalizers")):
        return None
    digits = [step for step in found if step["type"] == "Digits"]
    levels = [step for step in found if step["type"] == "ByteLevel" and not step["add_prefix_space"]]
    splits = [step for step in found if step in SPLITS]
    words = len(splits) + sum(level["use_regex"] for level in levels)
    is_known = len(levels) == 1 and found[-1:] == levels and len(digits) + len(levels) + len(splits) == len(found)
    return Cuts(_IN_WORDS) if is_known and words else None


def _sentencepiece_cuts(pipeline: dict[str, Any], tokens: Collection[str]) -> Cuts | None:
    """Return the cuts of a BPE as of Llama 2: before a space, unless a merge crosses one."""
    normalizer = steps(pipeline.get("normalizer"), "normalizers")
    found = steps(pipeline.get("pre_tokenizer"), "pretokenizers")
    legacy = normalizer == _LEGACY and not found
    metaspace = not normalizer and [(step["type"], step.get("replacement")) for step in found] == [("Metaspace", SPACE)]
    if not (legacy or metaspace) or SPACE not in tokens or any(map(_INSIDE.search, tokens)):
        return None
    return Cuts(_BEFORE_WORDS, drops_space=legacy)
