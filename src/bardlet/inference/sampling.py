"""Sampling from logits: temperature, top-k, top-p, and a random number generator per row."""

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
    """Sample the next id of each row (int64, B) from softmax(logits / temperature); temperature 0 is greedy.

    `top_k` keeps the k likeliest ids; `top_p` then keeps the smallest set whose probability reaches p (Holtzman et al.
    2020, *The Curious Case of Neural Text Degeneration*, section 3.1). `generator` is on the CPU, one for all rows or
    one per row; each row consumes one random number.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    if isinstance(generator, Sequence):
        u_B1 = torch.stack([torch.rand(1, generator=row) for row in generator])
    else:
        u_B1 = torch.rand(len(logits_BV), 1, generator=generator)
    return _draw(logits_BV, temperature, top_k, top_p, u_B1)


def _draw(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, u_B1: Tensor) -> Tensor:
    """Invert the cumulative distribution at u_B1, in [0, 1): the first id whose cumulative probability exceeds it."""
    cumulative_BV = probabilities(logits_BV, temperature, top_k, top_p).cumsum(dim=-1)
    u_B1 = u_B1.to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, u_B1, right=True)[:, 0].to(logits_BV.device)


def probabilities(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the distribution that `sample_next` samples from, for a temperature above 0: float64 (B, V)."""
    scaled_BV = logits_BV.to("cpu", torch.float64)  # every CPU has float64; not every accelerator does
    scaled_BV = scaled_BV.sub(scaled_BV.amax(dim=-1, keepdim=True)).div_(temperature)
    if top_k is not None and top_k < scaled_BV.shape[-1]:
        kept, index = scaled_BV.topk(top_k, dim=-1, sorted=False)  # exactly k, even with ties
        scaled_BV = torch.full_like(scaled_BV, float("-inf")).scatter_(-1, index, kept)
    if top_p is not None and top_p < 1:
        ranked, index = scaled_BV.sort(dim=-1, descending=True, stable=True)
        before = F.pad(ranked.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))  # total probability of the likelier ids
        scaled_BV = scaled_BV.scatter(-1, index, ranked.masked_fill(before >= top_p, float("-inf")))
    return scaled_BV.softmax(dim=-1)


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """Return a seed for each row: derived from an int, a sequence as given, or from the operating system for None."""
    if seed is None:
        return [torch.Generator().seed() for _ in range(rows)]
    if isinstance(seed, int):  # far apart: seeds 1 and 2 share no row seeds
        return [(seed * 1_000_003 + row) % 2**63 for row in range(rows)]
    if len(seed) != rows:
        raise BardletError(f"{len(seed)} seeds for {rows} prompts; give one seed, or one for each prompt")
    return list(seed)


class _Draws:
    """The random numbers of `sample_next`, one per row and step, drawn for many steps at once."""

    AHEAD = 256

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators, self.step = [torch.Generator().manual_seed(seed) for seed in seeds], 0

    def next(self, rows: list[int]) -> Tensor:
        """Return the next number of each of `rows`, (B, 1); the other rows skip theirs."""
        column = self.step % self.AHEAD
        if column == 0:
            self.u_BN = torch.stack([torch.rand(self.AHEAD, generator=row) for row in self.generators])
        self.step += 1
        u_B1 = self.u_BN[:, column : column + 1]
        return u_B1 if len(rows) == len(u_B1) else u_B1[rows]
