"""Lines in, their translations out, in the same order: what a model trained on pairs is for.

An encoder-decoder reads each source once, and its cross-attention's keys and values are kept, one copy for all beams
of a source. A decoder-only model that learned source, separator, target reads the source as a prompt. Lines of similar
lengths are translated together. Shape suffixes: those of `inference/beam_search.py` and `models/layers.py`.
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
from bardlet.inference.decoders.cache import PlainCache
from bardlet.inference.generate import eval_mode, pad_rows, prefill
from bardlet.runtime.threads import THREADS, run_in_threads
from bardlet.tokenizer import Tokenizer

log = logging.getLogger("bardlet")

MAX_LOGITS = 100_000_000
"""Parameters of a model whose products occupy all cores by themselves: its batches are translated one by one."""


@dataclass(frozen=True)
class TranslateOptions:
    """How to translate. prefix_lm: the decoder-only model was trained to see its source both ways."""

    beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 64
    prefix_lm: bool = False


def translate_lines(model: Any, tokenizer: Tokenizer, sources: Sequence[str], how: TranslateOptions = TranslateOptions()) -> list[str]:
    """The translation of each line; of an empty one, an empty one.

    A source that is too long for the model is cut, and a notice says so. The model is in eval mode meanwhile.
    """
    done = [""] * len(sources)
    for place, text in stream(model, tokenizer, sources, how):
        done[place] = text
    return done


def stream(model: Any, tokenizer: Tokenizer, sources: Sequence[str], how: TranslateOptions = TranslateOptions(),
           before: int = 0) -> Iterator[tuple[int, str]]:
    """(number of the line, from 0 on; translation), as they are done: a batch of lines of similar lengths at a time.

    The longest come first: on a CPU some batches are translated side by side, and a short one is waited for less.
    before: how many lines came before these, for what is said of one.
    """
    stop, start = check(model, tokenizer, how)
    ids = {i: tokenizer.encode(line.strip()) for i, line in enumerate(sources) if line.strip()}
    room = longest_source(model)
    if cut := [i for i, row in ids.items() if len(row) + 1 > room]:
        more = f" and {len(cut) - 1:,} more" if len(cut) > 1 else ""
        log.warning("line %d%s: longer than the %d tokens that the model reads; only its beginning is translated",
                    before + cut[0] + 1, more, room)
    yield from ((i, "") for i, line in enumerate(sources) if i not in ids)
    order = sorted(ids, key=lambda i: (len(ids[i]), i))
    batches = [order[first : first + how.batch_size] for first in range(0, len(order), how.batch_size)][::-1]
    device, weights = next(model.parameters()).device, sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        decoder = decoders.decoder(model)

    def one(these: list[int]) -> list[list[int]]:
        return _translate(model, [source_ids(model, ids[i], stop) for i in these], stop, start, how, decoder)

    most = 1 if weights > MAX_LOGITS else THREADS
    with eval_mode(model), closing(run_in_threads(one, batches, device, most)) as translated:
        for these, made in zip(batches, translated, strict=True):
            for i, target in zip(these, made, strict=True):
                known = [token for token in target if token < tokenizer.vocab_size]
                yield i, " ".join(tokenizer.decode(known, skip_special=True).split())  # a line stays one line


def check(model: Any, tokenizer: Tokenizer, how: TranslateOptions) -> tuple[int, int]:
    """(the id that ends a line, the one that a decoder begins with). BardletError where it cannot translate so."""
    if tokenizer.eos_id is None or tokenizer.pad_id is None:
        raise BardletError("the model's tokenizer has no token for the end of a line, or none for padding: "
                           "it was not trained to translate; train one with --pair, or --source and --target")
    if how.beams < 1 or 2 * how.beams > model.config.vocab_size:
        raise BardletError(f"--beam {how.beams}: from 1 to half of the vocabulary, {model.config.vocab_size // 2}")
    if how.batch_size < 1:
        raise BardletError(f"--batch-size {how.batch_size}: it must be at least 1")
    return tokenizer.eos_id, tokenizer.pad_id


def source_ids(model: Any, ids: np.ndarray, stop: int) -> list[int]:
    """A source as the model reads it: its ids, or as many of the first as fit, and the separator."""
    return [*ids[: longest_source(model) - 1].tolist(), stop]


def longest_source(model: Any) -> int:
    """Tokens of the longest source, its separator among them: a decoder-only model keeps half of its window free."""
    block = model.config.block_size
    return int(block if hasattr(model, "encode") else max(1, block // 2))


def translate(model: Any, sources: Sequence[Sequence[int]], stop: int, start: int, how: TranslateOptions = TranslateOptions()) -> list[list[int]]:
    """The target's ids of each source's, which end with the separator `stop`; theirs is left out.

    start: what the decoder of an encoder-decoder begins with. A target has at most twice the tokens of its source and
    20 more, or what fits into the model's window.
    """
    with eval_mode(model), torch.inference_mode():
        return _translate(model, sources, stop, start, how, decoders.decoder(model))


@torch.inference_mode()
def _translate(model: Any, sources: Sequence[Sequence[int]], stop: int, start: int, how: TranslateOptions,
               decoder: Any) -> list[list[int]]:  # fmt: skip
    """The same of a model in eval mode, with its decoder, in any thread: inference mode is a thread's own."""
    crosses = hasattr(model, "encode")
    room = model.config.block_size - (0 if crosses else longest_source(model))
    most = [min(2 * len(source) + 20, room) for source in sources]
    reader: beam_search.StepReader = (EncDecReader(model, decoder, sources, start, max(most)) if crosses
                             else PrefixReader(model, decoder, sources, max(most), how.prefix_lm))
    if how.beams == 1:
        return beam_search.greedy(reader, stop, most)
    return beam_search.beam(reader, stop, most, how.beams, how.length_penalty)


def cross_attention(model: Any, tokenizer: Tokenizer, line: str, how: TranslateOptions = TranslateOptions()) -> tuple[Tensor, list[str], list[str]]:
    """Where an encoder-decoder looks as it translates a line.

    Returns (weights of the cross-attention, fp32 (layers, heads, T, S); the S tokens that it reads, as texts; the T
    that it writes). Row t is where the decoder looks as it predicts token t.
    """
    stop, start = check(model, tokenizer, how)
    source = source_ids(model, tokenizer.encode(line.strip()), stop)
    target = [*translate(model, [source], stop, start, how)[0], stop][: model.config.block_size]
    device = next(model.parameters()).device
    maps = model.cross_attention(torch.tensor([source], device=device),
                                 torch.tensor([[start, *target[:-1]]], device=device))[:, 0]
    read, written = ([tokenizer.decode([i] if i < tokenizer.vocab_size else []) for i in side] for side in (source, target))
    return maps.float().cpu(), read, written


class EncDecReader:
    """An encoder-decoder as a reader."""

    def __init__(self, model: Any, decoder: Any, sources: Sequence[Sequence[int]], start: int, most: int) -> None:
        self.model, self.decode, self.start, self.most = model, decoder, start, most
        self.src_BS, self.length_B = pad_rows(sources, next(model.parameters()).device)

    def first(self) -> Tensor:
        """Reads the sources, and the token that a target begins with."""
        self.written = self.decode.begin(self.model.encode(self.src_BS, self.length_B), self.most)
        return self.next(torch.full_like(self.length_B, self.start))

    def branch(self, beams: int) -> None:
        """See `beam_search.StepReader`."""
        rows = torch.arange(len(self.length_B), device=self.length_B.device)
        self.written.reorder(rows.repeat_interleave(beams))

    def next(self, idx_R: Tensor) -> Tensor:
        """See `beam_search.StepReader`."""
        return self.decode(idx_R, self.written)

    def reorder(self, row_R: Tensor) -> None:
        """See `beam_search.StepReader`."""
        self.written.reorder(row_R)

    def select(self, source_B: Tensor, beams: int) -> None:
        """See `beam_search.StepReader`."""
        self.written.select(source_B, beams)


class PrefixReader:
    """A decoder-only model as a reader: the source is its prompt."""

    def __init__(self, model: Any, decoder: Any, sources: Sequence[Sequence[int]], most: int, prefix_lm: bool) -> None:
        self.model, self.decode, self.prefix_lm, self.most = model, decoder, prefix_lm, most
        self.src_BS, self.length_B = pad_rows(sources, next(model.parameters()).device)

    def first(self) -> Tensor:
        """Reads the sources."""
        cache = self.model.new_cache(len(self.length_B), self.src_BS.shape[1] + self.most)
        seen = self.length_B if self.prefix_lm else None
        logits_BV = prefill(self.model, self.src_BS, self.length_B, cache, seen)
        self.cache = PlainCache(cache)
        return logits_BV

    def branch(self, beams: int) -> None:
        """See `beam_search.StepReader`."""
        self.reorder(torch.arange(len(self.length_B), device=self.length_B.device).repeat_interleave(beams))

    def next(self, idx_R: Tensor) -> Tensor:
        """See `beam_search.StepReader`."""
        return self.decode(idx_R, self.cache)

    def reorder(self, row_R: Tensor) -> None:
        """See `beam_search.StepReader`."""
        self.cache.select(row_R)

    def select(self, source_B: Tensor, beams: int) -> None:
        """See `beam_search.StepReader`."""
        self.reorder((source_B[:, None] * beams + torch.arange(beams, device=source_B.device)).flatten())
