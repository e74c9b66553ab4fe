"""Small tokenizers with the pipelines of the open models: SmolLM2, Llama 3, Qwen2, Llama 2 and their kin."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bardlet import tokenizer as tk

SPACE = "\u2581"
FRAGMENTS = [*" \n\t'.,!1aéZ明。\x1c\xa0\u3000€", "'s", "'LL", " the", "   ", "\r\n", "123", "e\u0301", " Who", "12345",
             "?\n", SPACE, "\U0001f642", "don't", "<x>"]
"""Texts whose order decides where words begin and which characters are spelled in bytes."""
PROSE = ("Shall I compare thee to a summer's day? Thou art more lovely, and 1609 times more temperate:\n"
         "Rough winds do shake the darling buds of May.\n\n") * 3
TEXTS = [PROSE, *("".join(random.Random(seed).choices(FRAGMENTS, k=300)) for seed in range(30))]
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def byte_level(words: list[Any], special: list[str], normalizer: Any = None, whole_words: bool = False) -> Tokenizer:
    """Return a byte-level BPE that splits words by the given rules.

    whole_words: a word that is in the vocabulary is a token, whatever the merges say.
    """
    inner = Tokenizer(models.BPE(ignore_merges=whole_words))
    inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.Sequence(words)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def smollm2() -> Tokenizer:
    return byte_level([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
                      ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"])


def llama3() -> Tokenizer:
    words = [pre_tokenizers.Split(Regex(WORDS), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    inner = byte_level(words, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
                               "<|end_header_id|>"], whole_words=True)
    start = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B",
                                          special_tokens=[("<|begin_of_text|>", 0)])
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    return inner


def qwen2() -> Tokenizer:
    words = [pre_tokenizers.Split(Regex(WORDS.replace("{1,3}", "")), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    inner = byte_level(words, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    inner.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return inner


def sentencepiece(scheme: str | None = None, crossing: bool = False) -> Tokenizer:
    """Return a BPE of characters with byte fallback.

    scheme: `prepend_scheme` of Metaspace; None: the normalizer of Llama 2. crossing: merges may cross spaces.
    """
    inner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", SPACE)
    if not crossing:
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]*"), "isolated")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=70,
                                  special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))])
    inner.train_from_iterator([PROSE] if crossing else TEXTS, trainer)
    pipeline = json.loads(inner.to_str())
    pipeline["added_tokens"] = pipeline["added_tokens"][:3]  # the bytes are ordinary tokens
    inner = Tokenizer.from_str(json.dumps(pipeline))
    inner.normalizer, inner.pre_tokenizer = None, None
    if scheme is None:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                         special_tokens=[("<s>", 1)])
    return inner


BUILDERS = {"smollm2": smollm2, "llama3": llama3, "qwen2": qwen2, "llama2": sentencepiece,
            "mistral": functools.partial(sentencepiece, "first"), "always": functools.partial(sentencepiece, "always")}
NAMES: dict[str, dict[str, Any]] = {
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    **{name: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
       for name in ("llama2", "mistral", "always")},
}
"""Entries of tokenizer_config.json."""


@functools.cache
def raw(name: str) -> Tokenizer:
    """Return a tokenizer of the library."""
    return BUILDERS[name]()


def with_added(name: str, *tokens: AddedToken) -> tk.Tokenizer:
    """Return a tokenizer with more tokens, which are not special."""
    inner = Tokenizer.from_str(raw(name).to_str())
    inner.add_tokens(list(tokens))
    return tk.Tokenizer(inner.to_str())


def write(folder: Path, name: str, **settings: Any) -> Path:
    """Write the tokenizer's two files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    raw(name).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **NAMES[name],
              **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder: Path, name: str, **settings: Any) -> tk.Tokenizer:
    """Write a tokenizer's files into a folder, and load them."""
    return tk.load(write(folder, name, **settings))
