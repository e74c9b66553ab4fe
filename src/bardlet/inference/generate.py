"""Text comes out one token at a time: the whole context once (prefill), then only what is new (decode).

Token ids in, token ids out. Every random number comes from generators made here, one a row, so sampling disturbs
no training run, and a row's text does not depend on the rows beside it. Shape suffixes are those of models/layers.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
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
    """The model is in eval mode inside, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def prefill(model: Any, idx_BT: Tensor, length_B: Tensor, cache: KVCache, prefix_B: Tensor | None = None) -> Tensor:
    """Feeds the first length_B tokens (int64, at least 1) of each row of idx_BT (int64) to the cache.

    Rows are padded on the right with any id: causality hides the padding from the tokens before it, and the next
    token overwrites it. prefix_B: so many tokens of each row see each other both ways. Returns the logits of the token
    after each row's last: (B, V).
    """
    start_B = cache.length_B.clone()
    x_BTC = model.hidden(idx_BT, cache, prefix_B=prefix_B)
    cache.length_B.copy_(start_B + length_B)
    return model.logits(x_BTC[torch.arange(len(idx_BT), device=idx_BT.device), length_B - 1])


def decode_step(model: Any, idx_B: Tensor, cache: KVCache) -> Tensor:
    """Feeds one more token (int64) to each row of the cache: logits of the one after it (B, V).

    The plain way, by the model itself; `decoders.decoder(model)` is the same in fewer operations.
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
    """The new ids of each prompt, up to max_new_tokens; a row ends with the first of stop_ids, which is kept.

    `on_token` gets each step's ids as they come, None for a row that has ended. options: those of `stream`.
    """
    new: list[list[int]] = [[] for _ in prompts]
    for ids in stream(model, prompts, max_new_tokens, **options):
        for row, token in zip(new, ids, strict=True):
            if token is not None:
                row.append(token)
        if on_token is not None:
            on_token(ids)
    return new


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
) -> Iterator[list[int | None]]:
    """Yields the next id of every row, step by step; None for a row that has ended. Stops when all have.

    A prompt has at least one id; only its last block_size ids are read. When a row fills the context window of a model
    with a cache, its last block_size // 2 tokens are prefilled again at the window's start: every logit is that of a
    context that the model was trained on, at a constant cost a token on average. A model without a cache, a rung of the
    ladder, reads the last block_size tokens anew for every token, as the lecture does.

    `seed`: an int gives every row a generator of its own, by its index; a sequence gives each row's seed. The model is
    in eval mode until the iterator is done or closed.

    `dtype`: compute with a copy of the model in that dtype. torch.int8 rounds the weights of what follows the prompts
    (`ops/linear.py: RoundedProduct`); the prompts are read by the model as it is. The model itself is left as it is.

    Raises BardletError for settings and prompts that make no sense, and for weights that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    int8 = dtype == torch.int8
    if int8 and not hasattr(model, "new_cache"):
        raise BardletError("int8 is for gpt2 and qwen3 models, which read a token once: take fp32 or bf16")
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
    """The steps of `stream`: `choose` takes logits (B, V) and the numbers of the rows to ids (B,)."""
    logits_BV = reader.first(context)
    alive = list(range(len(context)))
    for step in range(max_new_tokens):
        if not math.isfinite(logits_BV.sum(dtype=torch.float32)):  # one number tells it of all
            raise BardletError("the model's logits are not finite: its weights are damaged, or its training diverged")
        idx_B = choose(logits_BV, alive)
        ids: list[int | None] = [None] * len(context)
        for row, token in zip(alive, idx_B.tolist(), strict=True):
            ids[row] = token
            context[row].append(token)
        yield ids
        going = [place for place, row in enumerate(alive) if ids[row] not in stop_ids]
        if not going or step == max_new_tokens - 1:
            return
        if len(going) < len(alive):  # the rows that ended leave the batch
            reader.select(going)
            idx_B, alive = idx_B[going], [alive[place] for place in going]
        logits_BV = reader.next(idx_B, [context[row] for row in alive])


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(idx_BT, length_B): rows of different lengths, with zeros behind the shorter ones."""
    length = [len(row) for row in rows]
    filled = [[*row, *[0] * (max(length) - len(row))] for row in rows]
    return torch.tensor(filled, device=device), torch.tensor(length, device=device)


class _CachedReader:
    """Logits of each row's next token, from a cache of what was read before.

    To take rows out of a `TransposedCache` copies all that is kept. So rows that have ended stay there, and are
    computed in vain, until they are a quarter: `places` has those of the rows that go on.
    """

    def __init__(self, model: Any, max_new_tokens: int, int8: bool) -> None:
        self.model, self.new, self.int8 = model, max_new_tokens, int8
        self.window, self.device = model.config.block_size, next(model.parameters()).device
        # with a PlainCache on a CPU attention to one token is eight times faster in fp32 (measured: 95 for 795 us)
        self.kept = torch.float32 if self.device.type == "cpu" else None

    def first(self, context: list[list[int]]) -> Tensor:
        """Reads every row's context."""
        longest = max(map(len, context))
        cache = self.model.new_cache(len(context), min(self.window, longest + self.new), self.kept)
        logits_BV = prefill(self.model, *pad_rows(context, self.device), cache)
        self.decode = decoders.decoder(self.model, torch.int8 if self.int8 else None)
        self.cache = self.decode.cache(cache)
        self.places = list(range(len(context)))
        return logits_BV

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows only."""
        self.places = [self.places[row] for row in rows]
        if not self.cache.copies or 4 * len(self.places) <= 3 * self.cache.rows:
            self.clear()

    def clear(self) -> None:
        """Takes the rows that have ended out of the cache."""
        self.cache.select(self.places)
        self.places = list(range(len(self.places)))

    def next(self, idx_B: Tensor, context: list[list[int]]) -> Tensor:
        """Reads one more token a row, which stands at the end of its context, too."""
        for place, row in zip(self.places, context, strict=True):
            if len(row) > self.window:
                del row[: -max(1, self.window // 2)]
                self.refill(row[:-1], place)
        ended = len(self.places) < self.cache.rows
        if ended and self.cache.full:  # one that has ended would need another place
            self.clear()
        if len(self.places) == self.cache.rows:
            return self.decode(idx_B, self.cache)
        all_B = idx_B.new_zeros(self.cache.rows)
        all_B[self.places] = idx_B
        return self.decode(all_B, self.cache)[self.places]

    def refill(self, ids: list[int], place: int) -> None:
        """Starts row `place` of the cache again with `ids` alone."""
        def fill(row: KVCache) -> None:
            if ids:
                self.model.hidden(torch.tensor([ids], device=self.device), row)

        self.cache.refill(place, len(ids), fill)


class _UncachedReader:
    """The same for a model without a cache, a rung of the ladder: the last window again at every token."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, next(model.parameters()).device

    def first(self, context: list[list[int]]) -> Tensor:
        """Reads every row's window: causality hides the padding from the tokens before it."""
        idx_BT, length_B = pad_rows([row[-self.model.config.block_size :] for row in context], self.device)
        return self.model(idx_BT)[torch.arange(len(context), device=self.device), length_B - 1]

    def select(self, rows: list[int]) -> None:
        """Nothing was kept."""

    def next(self, idx_B: Tensor, context: list[list[int]]) -> Tensor:
        """Reads the windows anew."""
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
        raise BardletError(f"cannot make {max_new_tokens} tokens: give 0 or more")
    if not 0 <= temperature < float("inf"):
        raise BardletError(f"temperature {temperature}: give 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise BardletError(f"top_k {top_k}: give 1 or more, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise BardletError(f"top_p {top_p}: give a probability above 0 and up to 1, or leave it out")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise BardletError(f"prompt {number} has no tokens: start it with at least one")
        wrong = next((i for i in prompt if not 0 <= i < model.config.vocab_size), None)
        if wrong is not None:
            raise BardletError(
                f"prompt {number} has the token {wrong}, but the vocabulary ends at {model.config.vocab_size - 1}"
            )
