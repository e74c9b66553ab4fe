"""Autoregressive generation: the whole context once (prefill), then one new token per step (decode).

Token ids in, token ids out. Each row has its own random generator: sampling does not disturb a training run, and a
row's completion does not depend on the rest of the batch. Shape suffixes: `models/layers.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.inference import decoders
from bardlet.inference.sampling import _draw, _Draws, row_seeds
from bardlet.models.layers import KVCache


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and restore its mode on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def prefill(model: Any, idx_BT: Tensor, length_B: Tensor, cache: KVCache, prefix_B: Tensor | None = None) -> Tensor:
    """Read the first length_B tokens (int64, at least 1) of each row of idx_BT (int64) into the cache.

    Rows are padded on the right with any id: causal attention hides the padding from the tokens before it, and the
    next token overwrites it. prefix_B: number of leading tokens per row with bidirectional attention. Returns the
    logits of each row's next token: (B, V).
    """
    start_B = cache.length_B.clone()
    x_BTC = model.hidden(idx_BT, cache, prefix_B=prefix_B)
    cache.length_B.copy_(start_B + length_B)
    return model.logits(x_BTC[torch.arange(len(idx_BT), device=idx_BT.device), length_B - 1])


def decode_step(model: Any, idx_B: Tensor, cache: KVCache) -> Tensor:
    """Append one token (int64) to each row of the cache and return the logits of the next one: (B, V).

    This is the reference implementation; `decoders.decoder(model)` computes the same in fewer operations.
    """
    return model.logits(model.hidden(idx_B[:, None], cache)[:, 0])


# ---------------------------------------------------------------------------- generation


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    on_token: Callable[[list[int | None]], None] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Return the new ids of each prompt, up to max_new_tokens or to its first id in stop_ids, which is kept.

    `on_token` is called with each step's ids, None for a finished row. options: see `stream`.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    for ids in stream(model, prompts, max_new_tokens, **options):
        for row, token in zip(completions, ids, strict=True):
            if token is not None:
                row.append(token)
        if on_token is not None:
            on_token(ids)
    return completions


@torch.inference_mode()
def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Generator[list[int | None], None, None]:
    """Yield the next id of every row, step by step, None for a finished row; stop when all rows are finished.

    A prompt has at least one id; only its last block_size ids are read. When a row fills the context window of a model
    with a cache, its last block_size // 2 tokens are prefilled again at the start of the window: positions stay within
    the trained range, at a constant average cost per token. A model without a cache (a lecture model) rereads the last
    block_size tokens for every token, as the lecture does.

    `seed`: an int seeds each row's generator by its index; a sequence holds one seed per row. The model is in eval mode
    until the iterator is exhausted or closed.

    `dtype`: compute with a copy of the model in that dtype. torch.int8 quantizes the decoder's weights
    (`ops/linear.py: Int8Linear`); the prompts are read in the model's own dtype. The model itself does not change.

    Raises BardletError for invalid settings or prompts, and for weights that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    int8 = dtype == torch.int8
    if int8 and not hasattr(model, "new_cache"):
        raise BardletError("int8 is for gpt2 and qwen3 models, which have a KV cache; use fp32 or bf16")
    if dtype not in (None, torch.int8, next(model.parameters()).dtype):
        model = copy.deepcopy(model).to(dtype)
    if not prompts or max_new_tokens == 0:
        return
    context = [list(prompt[-model.config.block_size :]) for prompt in prompts]
    draws = None if temperature == 0 else _Draws(row_seeds(seed, len(prompts)))
    reader = _CachedReader(model, max_new_tokens, int8) if hasattr(model, "new_cache") else _UncachedReader(model)

    def choose(logits_BV: Tensor, alive: list[int]) -> Tensor:
        if draws is None:
            return logits_BV.argmax(dim=-1)
        return _draw(logits_BV, temperature, top_k, top_p, draws.next(alive))

    with eval_mode(model):
        yield from _steps(reader, context, choose, frozenset(stop_ids), max_new_tokens)


def _steps(
    reader: _CachedReader | _UncachedReader,
    context: list[list[int]],
    choose: Callable[[Tensor, list[int]], Tensor],
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> Iterator[list[int | None]]:
    """Run the steps of `stream`; `choose` maps logits (B, V) and the row numbers to ids (B,)."""
    logits_BV = reader.first(context)
    alive = list(range(len(context)))
    for step in range(max_new_tokens):
        if not math.isfinite(logits_BV.sum(dtype=torch.float32)):  # a NaN or inf anywhere makes the sum NaN or inf
            raise BardletError("the model's logits are not finite: its weights are damaged or training diverged; "
                               "run `bardlet doctor` on its folder")
        idx_B = choose(logits_BV, alive)
        ids: list[int | None] = [None] * len(context)
        for row, token in zip(alive, idx_B.tolist(), strict=True):
            ids[row] = token
            context[row].append(token)
        yield ids
        unfinished = [i for i, row in enumerate(alive) if ids[row] not in stop_ids]
        if not unfinished or step == max_new_tokens - 1:
            return
        if len(unfinished) < len(alive):
            reader.select(unfinished)
            idx_B, alive = idx_B[unfinished], [alive[i] for i in unfinished]
        logits_BV = reader.next(idx_B, [context[row] for row in alive])


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (idx_BT, length_B): rows of different lengths, padded with zeros on the right."""
    length = [len(row) for row in rows]
    padded = [[*row, *[0] * (max(length) - len(row))] for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(length, device=device)


class _CachedReader:
    """Logits of each row's next token, by a decoder with a KV cache.

    Removing rows from a `TransposedCache` copies the whole cache. Finished rows therefore stay in it, and are computed
    for nothing, until they are a quarter of the rows. `cache_rows` maps unfinished rows to rows of the cache.
    """

    def __init__(self, model: Any, max_new_tokens: int, int8: bool) -> None:
        self.model, self.max_new_tokens, self.int8 = model, max_new_tokens, int8
        self.window, self.device = model.config.block_size, next(model.parameters()).device
        # on a CPU, attention of one query to a PlainCache is eight times faster in fp32 (measured: 95 vs 795 us)
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else None

    def first(self, context: list[list[int]]) -> Tensor:
        """Read every row's context and return the logits of its next token: (B, V)."""
        longest = max(map(len, context))
        cache = self.model.new_cache(len(context), min(self.window, longest + self.max_new_tokens),
                                     self.cache_dtype)
        logits_BV = prefill(self.model, *pad_rows(context, self.device), cache)
        self.decode = decoders.decoder(self.model, torch.int8 if self.int8 else None)
        self.cache = self.decode.cache(cache)
        self.cache_rows = list(range(len(context)))
        return logits_BV

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""
        self.cache_rows = [self.cache_rows[row] for row in rows]
        if not self.cache.copies or 4 * len(self.cache_rows) <= 3 * self.cache.rows:
            self.compact()

    def compact(self) -> None:
        """Remove the finished rows from the cache."""
        self.cache.select(self.cache_rows)
        self.cache_rows = list(range(len(self.cache_rows)))

    def next(self, idx_B: Tensor, context: list[list[int]]) -> Tensor:
        """Read one more token per row, already appended to its context, and return the next logits: (B, V)."""
        for cache_row, row in zip(self.cache_rows, context, strict=True):
            if len(row) > self.window:
                del row[: -max(1, self.window // 2)]
                self.refill(row[:-1], cache_row)
        has_finished = len(self.cache_rows) < self.cache.rows
        if has_finished and self.cache.full:  # a finished row may be the one that is full
            self.compact()
        if len(self.cache_rows) == self.cache.rows:
            return self.decode(idx_B, self.cache)
        all_B = idx_B.new_zeros(self.cache.rows)
        all_B[self.cache_rows] = idx_B
        return self.decode(all_B, self.cache)[self.cache_rows]

    def refill(self, ids: list[int], cache_row: int) -> None:
        """Replace the content of row `cache_row` of the cache with `ids`."""
        def fill(row: KVCache) -> None:
            if ids:
                self.model.hidden(torch.tensor([ids], device=self.device), row)

        self.cache.refill(cache_row, len(ids), fill)


class _UncachedReader:
    """Logits of each row's next token by a model without a cache (a lecture model): reread the window each time."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, next(model.parameters()).device

    def first(self, context: list[list[int]]) -> Tensor:
        """Read every row's window; causal attention hides the padding from the tokens before it."""
        idx_BT, length_B = pad_rows([row[-self.model.config.block_size :] for row in context], self.device)
        return self.model(idx_BT)[torch.arange(len(context), device=self.device), length_B - 1]

    def select(self, rows: list[int]) -> None:
        """Do nothing: there is no cache."""

    def next(self, idx_B: Tensor, context: list[list[int]]) -> Tensor:
        """Read every window again."""
        return self.first(context)


def _check(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if max_new_tokens < 0:
        raise BardletError(f"cannot generate {max_new_tokens} tokens; give 0 or more")
    if not 0 <= temperature < float("inf"):
        raise BardletError(f"temperature {temperature}: must be at least 0 (0: always the likeliest token)")
    if top_k is not None and top_k < 1:
        raise BardletError(f"top_k {top_k}: must be at least 1; None keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise BardletError(f"top_p {top_p}: must be above 0 and at most 1; None keeps all tokens")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise BardletError(f"prompt {number} has no tokens; give at least one")
        invalid = next((i for i in prompt if not 0 <= i < model.config.vocab_size), None)
        if invalid is not None:
            raise BardletError(
                f"prompt {number} has token {invalid}; ids must be from 0 to {model.config.vocab_size - 1}"
            )
