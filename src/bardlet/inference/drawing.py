"""Draw the next tokens of sequences that each have their own settings, and report log-probabilities.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bardlet.inference.sampling import draw


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Rules by which the next token of a sequence is drawn.

    temperature, top_k, top_p: see `sampling.sample_next`. presence_penalty, frequency_penalty: subtracted from the
    logits of new tokens that occurred, and for each occurrence. logit_bias: added to the logits of these ids.
    top_logprobs: report the log-probability of the chosen token and of this many of the likeliest; None: of no token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of a sequence.

    logprob: nats, of the model itself, before temperature, bias and penalties; None if it was not asked for, and for
    the first token of a prompt. top: the likeliest (id, log-probability), likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Draws:
    """The draws of one sequence: its settings, its random numbers, and what to add to its logits."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        """seed: see `sampling.row_seeds`."""
        self.sampling, self.numbers = sampling, self._numbers(seed)
        self._drawn = set[int]()
        self._change_V: Tensor | None = None

    @staticmethod
    def _numbers(seed: int) -> Iterator[float]:
        """Yield numbers from [0, 1), drawn 256 at a time."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.rand(256, generator=generator).tolist()

    @property
    def penalizes(self) -> bool:
        """True if tokens that were drawn have a penalty."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """Return the logits with biases and penalties."""
        if self._change_V is None:
            self._change_V = torch.zeros_like(logits_V)
            bias = self.sampling.logit_bias
            if bias:
                self._change_V[list(bias)] = torch.tensor(list(bias.values()), device=logits_V.device)
        return logits_V + self._change_V

    def count(self, token: int) -> None:
        """Make a token that was drawn less likely, if there are penalties. Follows a call of `adjusted`."""
        if self._change_V is not None and self.penalizes:
            first = token not in self._drawn
            self._drawn.add(token)
            self._change_V[token] -= self.sampling.frequency_penalty + first * self.sampling.presence_penalty


def next_tokens(draws: Sequence[Draws], logits_BV: Tensor) -> list[Token]:
    """Draw the next token of each sequence from its logits (B, V)."""
    adjusted_BV, ids, rows_of = logits_BV, [0] * len(draws), dict[tuple[Any, ...], list[int]]()
    for row, each in enumerate(draws):
        s = each.sampling
        if s.logit_bias or each.penalizes:
            if adjusted_BV is logits_BV:
                adjusted_BV = logits_BV.float().clone()
            adjusted_BV[row] = each.adjusted(adjusted_BV[row])
        rows_of.setdefault((s.temperature, s.top_k, s.top_p), []).append(row)
    for (temperature, top_k, top_p), rows in rows_of.items():
        part_BV = adjusted_BV if len(rows) == len(draws) else adjusted_BV[rows]
        u_B1 = torch.tensor([[next(draws[row].numbers)] for row in rows])
        for row, token in zip(rows, draw(part_BV, temperature, top_k, top_p, u_B1).tolist(), strict=True):
            ids[row] = token
            draws[row].count(token)
    return with_logprobs(ids, logits_BV, [each.sampling for each in draws])


def with_logprobs(ids: Sequence[int], logits_BV: Tensor, sampling: Sequence[Sampling]) -> list[Token]:
    """Return tokens, drawn from logits (B, V), with the log-probabilities that were asked for."""
    tokens = [Token(token) for token in ids]
    rows = [row for row, s in enumerate(sampling) if s.top_logprobs is not None]
    if not rows:
        return tokens
    logp_BV = logits_BV[rows].float().log_softmax(dim=-1)
    chosen = logp_BV[torch.arange(len(rows)), [ids[row] for row in rows]].tolist()
    parts_of = dict[int, list[int]]()
    for part, row in enumerate(rows):
        parts_of.setdefault(min(sampling[row].top_logprobs or 0, logp_BV.shape[-1]), []).append(part)
    for number, parts in parts_of.items():  # among equal values, topk chooses others for another number
        top = (logp_BV if len(parts) == len(rows) else logp_BV[parts]).topk(number, dim=-1)
        for part, values, indices in zip(parts, top.values.tolist(), top.indices.tolist(), strict=True):
            tokens[rows[part]] = Token(ids[rows[part]], chosen[part], tuple(zip(indices, values, strict=True)))
    return tokens
