"""Translate lines with a model that was trained on pairs.

An encoder-decoder reads each source once; its cross-attention keys and values are cached, one copy for all beams of a
source. A decoder-only model, trained on source, separator, target, reads the source as a prompt. Lines of similar
length are translated together. Shape suffixes: `inference/beam_search.py` and `models/layers.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.inference import beam_search, decoders
from bardlet.inference.generate import eval_mode, pad_rows, prefill
from bardlet.runtime.threads import THREADS, run_in_threads
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

LARGE_MODEL = 100_000_000
"""Parameters above which one batch keeps all cores busy: larger models translate one batch at a time."""


@dataclass(frozen=True)
class TranslateOptions:
    """Decoding options. prefix_lm: the decoder-only model was trained with bidirectional attention on the source."""

    beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 64
    prefix_lm: bool = False


def translate_lines(model: Any, tokenizer: Tokenizer, sources: Sequence[str],
                    options: TranslateOptions = TranslateOptions()) -> list[str]:  # fmt: skip
    """Return the translation of each line; an empty line stays empty.

    A source that is too long for the model is truncated, with a warning. The model is in eval mode meanwhile.
    """
    translations = [""] * len(sources)
    for i, text in stream(model, tokenizer, sources, options):
        translations[i] = text
    return translations


def stream(model: Any, tokenizer: Tokenizer, sources: Sequence[str], options: TranslateOptions = TranslateOptions(),
           lines_before: int = 0) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yield (line index from 0, translation) as batches of lines of similar length finish.

    The longest lines come first: on a CPU, batches run in parallel, and the short ones fill the gaps at the end.
    lines_before: number of lines before these, for the line numbers of warnings.
    """
    stop, start = check(model, tokenizer, options)
    ids = {i: tokenizer.encode(line.strip()) for i, line in enumerate(sources) if line.strip()}
    max_source = longest_source(model)
    if cut := [i for i, row in ids.items() if len(row) + 1 > max_source]:
        more = f" and {len(cut) - 1:,} more" if len(cut) > 1 else ""
        log.warning("line %d%s: longer than the %d tokens that the model reads; only its beginning is translated",
                    lines_before + cut[0] + 1, more, max_source)
    yield from ((i, "") for i, line in enumerate(sources) if i not in ids)
    order = sorted(ids, key=lambda i: (len(ids[i]), i))
    size = options.batch_size
    batches = [order[first : first + size] for first in range(0, len(order), size)][::-1]
    device, weights = next(model.parameters()).device, sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        decoder = decoders.decoder(model)

    def translate_batch(batch: list[int]) -> list[list[int]]:
        return _translate(model, [source_ids(model, ids[i], stop) for i in batch], stop, start, options, decoder)

    max_threads = 1 if weights > LARGE_MODEL else THREADS
    with eval_mode(model), closing(run_in_threads(translate_batch, batches, device, max_threads)) as translated:
        for batch, targets in zip(batches, translated, strict=True):
            for i, target in zip(batch, targets, strict=True):
                with_text = [token for token in target if token < tokenizer.vocab_size]  # without padding ids
                yield i, " ".join(tokenizer.decode(with_text, skip_special=True).split())  # a line stays one line


def check(model: Any, tokenizer: Tokenizer, options: TranslateOptions) -> tuple[int, int]:
    """Return (id that ends a line, id that a decoder starts with).

    Raises:
        BardletError: the model or the options cannot be used to translate.
    """
    if tokenizer.eos_id is None or tokenizer.pad_id is None:
        raise BardletError("the model was not trained to translate: its tokenizer lacks an end-of-line or padding "
                           "token; train one with --pair, or --source and --target")
    if options.beams < 1 or 2 * options.beams > model.config.vocab_size:
        raise BardletError(f"--beam {options.beams}: must be from 1 to {model.config.vocab_size // 2}, half of the "
                           "vocabulary")
    if options.batch_size < 1:
        raise BardletError(f"--batch-size {options.batch_size}: must be at least 1")
    return tokenizer.eos_id, tokenizer.pad_id


def source_ids(model: Any, ids: np.ndarray, stop: int) -> list[int]:
    """Return the source as the model reads it: its ids, truncated to fit, and the separator."""
    return [*ids[: longest_source(model) - 1].tolist(), stop]


def longest_source(model: Any) -> int:
    """Return the maximum source length in tokens, separator included; a decoder-only model reserves half its window."""
    block = model.config.block_size
    return int(block if hasattr(model, "encode") else max(1, block // 2))


def translate(model: Any, sources: Sequence[Sequence[int]], stop: int, start: int,
              options: TranslateOptions = TranslateOptions()) -> list[list[int]]:  # fmt: skip
    """Return the target ids of each source. Sources end with the separator `stop`; targets come without it.

    start: first token of an encoder-decoder's decoder. A target has at most twice the tokens of its source plus 20, or
    what fits in the model's window.
    """
    with eval_mode(model), torch.inference_mode():
        return _translate(model, sources, stop, start, options, decoders.decoder(model))


@torch.inference_mode()
def _translate(model: Any, sources: Sequence[Sequence[int]], stop: int, start: int, options: TranslateOptions,
               decoder: Any) -> list[list[int]]:  # fmt: skip
    """Run `translate` in any thread (inference mode is per thread); the model must be in eval mode."""
    is_encdec = hasattr(model, "encode")
    max_target = model.config.block_size - (0 if is_encdec else longest_source(model))
    max_tokens = [min(2 * len(source) + 20, max_target) for source in sources]
    reader: beam_search.StepReader = (
        EncDecReader(model, decoder, sources, start, max(max_tokens)) if is_encdec
        else PrefixReader(model, decoder, sources, max(max_tokens), options.prefix_lm)
    )  # fmt: skip
    if options.beams == 1:
        return beam_search.greedy(reader, stop, max_tokens)
    return beam_search.beam(reader, stop, max_tokens, options.beams, options.length_penalty)


def cross_attention(model: Any, tokenizer: Tokenizer, line: str,
                    options: TranslateOptions = TranslateOptions()) -> tuple[Tensor, list[str], list[str]]:  # fmt: skip
    """Return an encoder-decoder's cross-attention as it translates a line.

    Returns (attention weights, fp32 (layers, heads, T, S); the S source tokens as texts; the T target tokens as texts).
    Row t holds the weights with which the decoder predicts target token t.
    """
    stop, start = check(model, tokenizer, options)
    source = source_ids(model, tokenizer.encode(line.strip()), stop)
    target = [*translate(model, [source], stop, start, options)[0], stop][: model.config.block_size]
    maps = attention_between(model, source, target, start)
    source_texts, target_texts = ([tokenizer.decode([i] if i < tokenizer.vocab_size else []) for i in side]
                                  for side in (source, target))  # fmt: skip
    return maps, source_texts, target_texts


def attention_between(model: Any, source: Sequence[int], target: Sequence[int], start: int) -> Tensor:
    """Return an encoder-decoder's cross-attention weights for a given translation: fp32 (layers, heads, T, S).

    source and target end with the separator; start: first token of the decoder. Row t predicts target token t.
    """
    device = next(model.parameters()).device
    with eval_mode(model), torch.inference_mode():
        maps = model.cross_attention(torch.tensor([list(source)], device=device),
                                     torch.tensor([[start, *target[:-1]]], device=device))[:, 0]
    return maps.float().cpu()


class EncDecReader:
    """A `StepReader` of an encoder-decoder."""

    def __init__(self, model: Any, decoder: Any, sources: Sequence[Sequence[int]], start: int,
                 max_tokens: int) -> None:  # fmt: skip
        self.model, self.decode, self.start, self.max_tokens = model, decoder, start, max_tokens
        self.src_BS, self.length_B = pad_rows(sources, next(model.parameters()).device)

    def first(self) -> Tensor:
        """Encode the sources, and read the first token of the targets."""
        self.cache = self.decode.new_cache(self.model.encode(self.src_BS, self.length_B), self.max_tokens)
        return self.next(torch.full_like(self.length_B, self.start))

    def branch(self, beams: int) -> None:
        """See `beam_search.StepReader`."""
        rows = torch.arange(len(self.length_B), device=self.length_B.device)
        self.cache.reorder(rows.repeat_interleave(beams))

    def next(self, idx_R: Tensor) -> Tensor:
        """See `beam_search.StepReader`."""
        return self.decode(idx_R, self.cache)

    def reorder(self, row_R: Tensor) -> None:
        """See `beam_search.StepReader`."""
        self.cache.reorder(row_R)

    def select(self, source_B: Tensor, beams: int) -> None:
        """See `beam_search.StepReader`."""
        self.cache.select(source_B, beams)


class PrefixReader:
    """A `StepReader` of a decoder-only model: the source is its prompt."""

    def __init__(self, model: Any, decoder: Any, sources: Sequence[Sequence[int]], max_tokens: int,
                 prefix_lm: bool) -> None:  # fmt: skip
        self.model, self.decode, self.prefix_lm, self.max_tokens = model, decoder, prefix_lm, max_tokens
        self.src_BS, self.length_B = pad_rows(sources, next(model.parameters()).device)

    def first(self) -> Tensor:
        """Prefill the sources."""
        self.cache = self.model.new_cache(len(self.length_B), self.src_BS.shape[1] + self.max_tokens)
        prefix_B = self.length_B if self.prefix_lm else None
        return prefill(self.model, self.src_BS, self.length_B, self.cache, prefix_B)

    def branch(self, beams: int) -> None:
        """See `beam_search.StepReader`."""
        self.reorder(torch.arange(len(self.length_B), device=self.length_B.device).repeat_interleave(beams))

    def next(self, idx_R: Tensor) -> Tensor:
        """See `beam_search.StepReader`."""
        return self.decode(idx_R, self.cache)

    def reorder(self, row_R: Tensor) -> None:
        """See `beam_search.StepReader`."""
        self.cache = self.cache.select(row_R)

    def select(self, source_B: Tensor, beams: int) -> None:
        """See `beam_search.StepReader`."""
        self.reorder((source_B[:, None] * beams + torch.arange(beams, device=source_B.device)).flatten())
