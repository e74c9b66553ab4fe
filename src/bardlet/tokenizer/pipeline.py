"""Properties of a `tokenizer.json`, from its content: its kind, and how much it can lengthen a text."""

from __future__ import annotations

import math
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
