"""Text comes out one token at a time: the whole context once (prefill), then only what is new (decode).

Token ids in, token ids out. Every random number comes from generators made here, one a row, so sampling disturbs
no training run, and a row's text does not depend on the rows beside it. Shape suffixes are those of models/layers.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.models.layers import KVCache


def prefill(model: Any, idx_BT: Tensor, length_B: Tensor, cache: KVCache) -> Tensor:
    """Feeds the first length_B tokens (int64, at least 1) of each row of idx_BT (int64) to the cache.

    Rows are padded on the right with any id: causality hides the padding from the tokens before it, and the next
    token overwrites it. Returns the logits of the token after each row's last: (B, V).
    """
    start_B = cache.length_B.clone()
    x_BTC = model.states(idx_BT, cache)
    cache.length_B.copy_(start_B + length_B)
    return model.logits(x_BTC[torch.arange(len(idx_BT), device=idx_BT.device), length_B - 1])


def decode_step(model: Any, idx_B: Tensor, cache: KVCache) -> Tensor:
    """Feeds one more token (int64) to each row of the cache: logits of the one after it (B, V).

    The plain way, by the model itself; `model.decoder()` is the same in fewer operations.
    """
    return model.logits(model.states(idx_B[:, None], cache)[:, 0])


# ---------------------------------------------------------------------------- sampling


def sample_next(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draws the next id of each row (int64, B) from softmax(logits / temperature); temperature 0 takes the likeliest.

    `top_k` keeps the k likeliest; `top_p` then keeps the smallest set whose probability reaches p (Holtzman et al.
    2020, *The Curious Case of Neural Text Degeneration*, section 3.1). `generator` is on the CPU: one for all rows, or
    one a row; each row takes one number of it.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probability_BV = probabilities(logits_BV, temperature, top_k, top_p)
    B = len(logits_BV)
    if isinstance(generator, Sequence):
        u_B1 = torch.stack([torch.rand(1, generator=row) for row in generator])
    else:
        u_B1 = torch.rand(B, 1, generator=generator)
    # the inverse of the distribution function: the first id whose running sum exceeds u
    cumulative_BV = probability_BV.cumsum(dim=-1)
    u_B1 = u_B1.to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, u_B1, right=True)[:, 0].to(logits_BV.device)


def probabilities(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The distribution that `sample_next` draws from, for a temperature above 0: float64 (B, V)."""
    scaled_BV = logits_BV.cpu().double()  # on the CPU, where every machine has float64
    scaled_BV = (scaled_BV - scaled_BV.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < scaled_BV.shape[-1]:
        kept, place = scaled_BV.topk(top_k, dim=-1)  # exactly k, also among equals
        scaled_BV = torch.full_like(scaled_BV, float("-inf")).scatter(-1, place, kept)
    if top_p is not None and top_p < 1:
        ranked, place = scaled_BV.sort(dim=-1, descending=True, stable=True)
        before = F.pad(ranked.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))  # probability of the likelier ones
        scaled_BV = scaled_BV.scatter(-1, place, ranked.masked_fill(before >= top_p, float("-inf")))
    return scaled_BV.softmax(dim=-1)


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed for each row. A sequence is taken as it is; None asks the operating system."""
    if seed is None:
        return [torch.Generator().seed() for _ in range(rows)]
    if isinstance(seed, int):  # far apart, so that the rows of seed 1 are not those of seed 2
        return [(seed * 1_000_003 + row) % 2**63 for row in range(rows)]
    if len(seed) != rows:
        raise BardletError(f"{len(seed)} seeds for {rows} prompts: give one seed, or one for each prompt")
    return list(seed)


# ---------------------------------------------------------------------------- generation


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[list[int | None]], None] | None = None,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, up to max_new_tokens; a row ends with the first of stop_ids, which is kept.

    `on_token` gets each step's ids as they come, None for a row that has ended. `dtype`: compute with a copy of the
    model in that dtype (the model itself is left as it is). See `stream` for the rest.
    """
    if dtype is not None and dtype != next(model.parameters()).dtype:
        model = copy.deepcopy(model).to(dtype)
    new: list[list[int]] = [[] for _ in prompts]
    for ids in stream(
        model, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_ids=stop_ids
    ):
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
) -> Iterator[list[int | None]]:
    """Yields the next id of every row, step by step; None for a row that has ended. Stops when all have.

    A prompt has at least one id; only its last block_size ids are read. When a row fills the context window of a model
    with a cache, its last block_size // 2 tokens are prefilled again at the window's start: every logit is that of a
    context that the model was trained on, at a constant cost a token on average. A model without a cache, a rung of the
    ladder, reads the last block_size tokens anew for every token, as the lecture does.

    `seed`: an int gives every row a generator of its own, by its index; a sequence gives each row's seed. The model is
    in eval mode until the iterator is done or closed.

    Raises BardletError for settings and prompts that make no sense, and for weights that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    training = model.training
    model.eval()
    try:
        yield from _stream(model, prompts, max_new_tokens, (temperature, top_k, top_p), seed, frozenset(stop_ids))
    finally:
        model.train(training)


def _stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    how: tuple[float, int | None, float | None],
    seed: int | Sequence[int] | None,
    stop_ids: frozenset[int],
) -> Iterator[list[int | None]]:
    if not prompts or max_new_tokens == 0:
        return
    context = [list(prompt[-model.config.block_size :]) for prompt in prompts]
    generators = [torch.Generator().manual_seed(s) for s in row_seeds(seed, len(prompts))]
    reader = _Cached(model, max_new_tokens) if hasattr(model, "new_cache") else _Uncached(model)
    logits_BV = reader.first(context)
    alive = list(range(len(prompts)))
    for step in range(max_new_tokens):
        if not bool(torch.isfinite(logits_BV).all()):
            raise BardletError("the model's logits are not finite: its weights are damaged, or its training diverged")
        idx_B = sample_next(logits_BV, *how, [generators[row] for row in alive])
        ids: list[int | None] = [None] * len(prompts)
        for row, token in zip(alive, idx_B.tolist(), strict=True):
            ids[row] = token
            context[row].append(token)
        yield ids
        going = [place for place, row in enumerate(alive) if ids[row] not in stop_ids]
        if not going or step == max_new_tokens - 1:
            return
        if len(going) < len(alive):  # the rows that ended leave the batch
            reader.keep(going)
            idx_B, alive = idx_B[going], [alive[place] for place in going]
        logits_BV = reader.next(idx_B, [context[row] for row in alive])


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(idx_BT, length_B): rows of different lengths, with zeros behind the shorter ones."""
    length = [len(row) for row in rows]
    padded = [row + [0] * (max(length) - len(row)) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(length, device=device)


class _Cached:
    """Logits of each row's next token, from a cache of what was read before."""

    def __init__(self, model: Any, max_new_tokens: int) -> None:
        self.model, self.new = model, max_new_tokens
        self.window, self.device = model.config.block_size, next(model.parameters()).device

    def first(self, context: list[list[int]]) -> Tensor:
        """Reads every row's context."""
        # on a CPU attention to one token is eight times faster in fp32 than in bf16 (measured: 95 against 795 us)
        dtype = torch.float32 if self.device.type == "cpu" else None
        longest = max(map(len, context))
        self.cache = self.model.new_cache(len(context), min(self.window, longest + self.new), dtype)
        logits_BV = prefill(self.model, *_padded(context, self.device), self.cache)
        self.decode = self.model.decoder()
        return logits_BV

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows only."""
        cache = self.cache
        self.cache = KVCache(cache.k[:, rows], cache.v[:, rows], cache.length_B[rows])

    def next(self, idx_B: Tensor, context: list[list[int]]) -> Tensor:
        """Reads one more token a row, which stands at the end of its context, too."""
        for place, row in enumerate(context):
            if len(row) > self.window:
                del row[: -max(1, self.window // 2)]
                _refill(self.model, row[:-1], self.cache, place)
        return self.decode(idx_B, self.cache)


class _Uncached:
    """The same for a model without a cache, a rung of the ladder: the last window again at every token."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, next(model.parameters()).device

    def first(self, context: list[list[int]]) -> Tensor:
        """Reads every row's window: causality hides the padding from the tokens before it."""
        idx_BT, length_B = _padded([row[-self.model.config.block_size :] for row in context], self.device)
        return self.model(idx_BT)[torch.arange(len(context), device=self.device), length_B - 1]

    def keep(self, rows: list[int]) -> None:
        """Nothing was kept."""

    def next(self, idx_B: Tensor, context: list[list[int]]) -> Tensor:
        """Reads the windows anew."""
        return self.first(context)


def _refill(model: Any, ids: list[int], cache: KVCache, place: int) -> None:
    """Starts row `place` of the cache again with `ids` alone."""
    at = slice(place, place + 1)
    row = KVCache(cache.k[:, at], cache.v[:, at], cache.length_B[at])  # views: what is written there is in the cache
    row.length_B.zero_()
    if ids:
        model.states(torch.tensor([ids], device=cache.length_B.device), row)


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
