"""Sampling from logits: temperature, top-k, top-p, and random numbers that each row owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.errors import BardletError


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
    if isinstance(generator, Sequence):
        u_B1 = torch.stack([torch.rand(1, generator=row) for row in generator])
    else:
        u_B1 = torch.rand(len(logits_BV), 1, generator=generator)
    return _draw(logits_BV, temperature, top_k, top_p, u_B1)


def _draw(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, u_B1: Tensor) -> Tensor:
    """The inverse of the distribution function at u_B1, in [0, 1): the first id whose running sum exceeds it."""
    cumulative_BV = probabilities(logits_BV, temperature, top_k, top_p).cumsum(dim=-1)
    u_B1 = u_B1.to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, u_B1, right=True)[:, 0].to(logits_BV.device)


def probabilities(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The distribution that `sample_next` draws from, for a temperature above 0: float64 (B, V)."""
    scaled_BV = logits_BV.to("cpu", torch.float64)  # on the CPU, where every machine has float64
    scaled_BV = scaled_BV.sub(scaled_BV.amax(dim=-1, keepdim=True)).div_(temperature)
    if top_k is not None and top_k < scaled_BV.shape[-1]:
        kept, place = scaled_BV.topk(top_k, dim=-1, sorted=False)  # exactly k, also among equals
        scaled_BV = torch.full_like(scaled_BV, float("-inf")).scatter_(-1, place, kept)
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


class _Draws:
    """The numbers that `sample_next` would draw, one a row and step, drawn for many steps at once."""

    AHEAD = 256

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators, self.step = [torch.Generator().manual_seed(seed) for seed in seeds], 0

    def next(self, rows: list[int]) -> Tensor:
        """The next number of each of `rows`; those of the others are passed over: (B, 1)."""
        place = self.step % self.AHEAD
        if place == 0:
            self.u_BN = torch.stack([torch.rand(self.AHEAD, generator=row) for row in self.generators])
        self.step += 1
        u_B1 = self.u_BN[:, place : place + 1]
        return u_B1 if len(rows) == len(u_B1) else u_B1[rows]
