"""Load the tokenizer of a model folder: tokenizer.json, or GPT-2's two files, vocab.json and merges.txt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from bardlet.errors import BardletError, one_line
from bardlet.runtime import manifest
from bardlet.tokenizer.base import BPE_SPECIAL, PAD, SEPARATOR, Tokenizer

MAX_TOKENIZER_BYTES = 1 << 25
"""Maximum size of a tokenizer's file in bytes; the tokenizer.json of Qwen3, with 151,000 tokens, is a third of that."""
GPT2_FILES = ("vocab.json", "merges.txt")
"""The tokenizer of gpt2 in folders that have no tokenizer.json."""
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
"""Tokenizer classes that split words by GPT-2's rule; the same two files of another class have other ids."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens with a role, in the order in which transformers adds them."""


def load(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder. BardletError if its files are missing or damaged."""
    folder = Path(folder)
    config = _settings(folder, "special_tokens_map.json") | _settings(folder, "tokenizer_config.json")
    if not os.path.lexists(folder / "tokenizer.json") and is_gpt2(folder):
        path, text = folder / GPT2_FILES[0], _read_gpt2(folder, config)
        config = {"bos_token": SEPARATOR} | config
    else:
        path = manifest.inside(folder, "tokenizer.json")
        text = _read_text(path)
    names = {name: _content(config.get(f"{name}_token")) or default
             for name, default in (("eos", SEPARATOR), ("pad", PAD))}
    try:
        tokenizer = Tokenizer(text, **names)
    except (ValueError, KeyError, TypeError) as error:
        raise BardletError(f"{path}: damaged ({one_line(error)}); copy it again from its source") from None
    tokenizer.bos, tokenizer.unk = (_content(config.get(f"{name}_token")) for name in ("bos", "unk"))
    if not set(BPE_SPECIAL) <= set(tokenizer.special.values()):  # in bardlet's own chat models, roles end an answer too
        tokenizer.stop_ids = tuple(dict.fromkeys((*tokenizer.stop_ids, *_ends(folder, tokenizer))))
    # transformers writes the template to a file of its own
    template = config.get("chat_template")
    if template is None and os.path.lexists(folder / "chat_template.jinja"):
        jinja = manifest.inside(folder, "chat_template.jinja")
        if jinja.stat().st_size <= MAX_TOKENIZER_BYTES:
            template = jinja.read_text(encoding="utf-8", errors="replace")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _ends(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a text by generation_config.json, or by config.json, where transformers looks next."""
    names = [name for name in ("generation_config.json", "config.json") if os.path.lexists(folder / name)]
    values = (_settings(folder, name).get("eos_token_id") for name in names)
    ends: Any = next((value for value in values if value is not None), [])
    known = set(tokenizer.vocab.values())
    return [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int and i in known]


def is_gpt2(folder: Path) -> bool:
    """Return True if a folder has the two files of gpt2's tokenizer, and no other class claims them."""
    if not all(os.path.lexists(folder / name) for name in GPT2_FILES):
        return False
    kind = _settings(folder, "tokenizer_config.json").get("tokenizer_class")
    model = _settings(folder, "config.json").get("model_type", "gpt2")
    return kind in GPT2_CLASSES and (kind is not None or model == "gpt2")


def _read_text(path: Path) -> str:
    """Return the text of a tokenizer's file."""
    if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
        raise BardletError(f"{path}: damaged (too large for a tokenizer: {size:,} bytes); copy it again")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise BardletError(f"{path}: cannot be read ({reason}); a model folder needs its {path.name}") from None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the folder; empty if there is no such file."""
    return manifest.read_json(folder / name) if os.path.lexists(folder / name) else {}


def _content(token: Any) -> str | None:
    """Return the text of a special token, which is a string or an object with its properties."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


# ---------------------------------------------------------------- GPT-2's two files


def _read_gpt2(folder: Path, config: dict[str, Any]) -> str:
    """Return the tokenizer.json of vocab.json and merges.txt, as transformers' GPT2Tokenizer computes it.

    config: the entries of tokenizer_config.json and special_tokens_map.json.
    """
    vocabulary, merges = (manifest.inside(folder, name) for name in GPT2_FILES)
    vocab = manifest.read_json(vocabulary)
    if wrong := next((token for token, i in vocab.items() if type(i) is not int or not 0 <= i < 1 << 24), None):
        raise BardletError(f"{vocabulary}: damaged: the id of {wrong[:40]!r} is not an id; copy it again")
    lines = [line for line in _read_text(merges).split("\n") if line.strip() and not line.startswith("#version")]
    pairs: list[Any] = [tuple(line.split()) for line in lines]
    if bad := next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None):
        raise BardletError(f"{merges}: damaged: the line {bad[:40]!r} is not two tokens; copy it again")
    try:
        inner = tokenizers.Tokenizer(BPE(vocab=vocab, merges=pairs))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
        inner.decoder = decoders.ByteLevel()
        inner.add_tokens(list(_added_tokens(folder, config, vocab)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, or panics
        raise BardletError(f"{merges}: damaged or of another {vocabulary.name} ({one_line(error)}); copy both again "
                           "from their source") from None
    return inner.to_str()


def _added_tokens(folder: Path, config: dict[str, Any], vocab: dict[str, int]) -> Iterator[AddedToken]:
    """Yield the tokens beside the vocabulary in the order of their ids, the special ones marked as such."""
    extra = config.get("additional_special_tokens")
    roles = [config.get(name, SEPARATOR if name in NAMED_TOKENS[:3] and SEPARATOR in vocab else None)
             for name in NAMED_TOKENS] + (extra if isinstance(extra, list) else [])
    special = {text: token for token in roles if (text := _content(token)) is not None}
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        tokens = [declared[i] for i in sorted(declared, key=int)]
    else:
        ids = _settings(folder, "added_tokens.json")
        tokens = sorted(ids, key=lambda token: int(ids[token]))
    known = {text: token for token in tokens if (text := _content(token)) is not None}
    for text, token in (known | {text: token for text, token in special.items() if text not in known}).items():
        properties = next((each for each in (token, special.get(text)) if isinstance(each, dict)), {})
        is_special = text in special or properties.get("special") is True
        flags = {name: properties.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
        yield AddedToken(text, special=is_special, normalized=properties.get("normalized", not is_special), **flags)
