"""Greedy and beam search, for encoder-decoder and decoder-only models alike.

Ids in, ids out. A `StepReader` holds the model's state for each source; the search only sees logits. Shape suffixes:
B sources, K beams per source, R rows (B K, the beams of a source adjacent), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bardlet.errors import BardletError


class StepReader(Protocol):
    """A model's decoding state: one row per beam of each source, and the logits of its next token."""

    def first(self) -> Tensor:
        """Read the sources and return the logits of the first token of each: (B, V)."""

    def branch(self, beams: int) -> None:
        """Copy the one row of each source into `beams` rows."""

    def next(self, idx_R: Tensor) -> Tensor:
        """Append one token (int64) to each row and return the logits of the next one: (R, V)."""

    def reorder(self, row_R: Tensor) -> None:
        """Keep these rows (int64), in this order; each stays with its source."""

    def select(self, source_B: Tensor, beams: int) -> None:
        """Keep these sources (int64, ascending) only, with all their beams."""


COMPACT_BELOW = 7 / 8
"""Finished sources are removed once the unfinished fraction falls below this: moving rows also takes time."""


@torch.inference_mode()
def greedy(reader: StepReader, stop: int, max_tokens: Sequence[int]) -> list[list[int]]:
    """Return each source's greedy completion, up to `stop`, which is left out, or to its `max_tokens`."""
    completions: list[list[int]] = [[] for _ in max_tokens]
    alive, unfinished = list(range(len(max_tokens))), [True] * len(max_tokens)
    logits_BV = _check_logits(reader.first())
    while True:
        idx_B = largest(logits_BV, 1)[1][:, 0]
        for row, (source, token) in enumerate(zip(alive, idx_B.tolist(), strict=True)):
            if unfinished[row] and token != stop:
                completions[source].append(token)
            unfinished[row] = unfinished[row] and token != stop and len(completions[source]) < max_tokens[source]
        if not any(unfinished):
            return completions
        if sum(unfinished) < COMPACT_BELOW * len(alive):
            kept = [row for row, keep in enumerate(unfinished) if keep]
            rows = torch.tensor(kept, device=idx_B.device)
            reader.select(rows, 1)
            idx_B, alive, unfinished = idx_B[rows], [alive[row] for row in kept], [True] * len(kept)
        logits_BV = reader.next(idx_B)


@dataclass
class _Beams:
    """The search state of B sources: K live beams each, and the best K finished hypotheses."""

    score: Tensor
    """(B, K): sum of log p over the tokens of a beam."""
    tokens: Tensor
    """(B, K, t) int64."""
    finished: Tensor
    """(B, K): length-normalized score of each finished hypothesis; -inf for an empty slot."""
    finished_tokens: Tensor
    """(B, K, max_tokens) int64, padded with `stop`."""
    max_tokens: Tensor
    """(B,): maximum number of tokens per source."""
    stop: int

    def select(self, source_B: Tensor) -> None:
        """Keep these sources only."""
        self.score, self.tokens = self.score[source_B], self.tokens[source_B]
        self.finished, self.finished_tokens = self.finished[source_B], self.finished_tokens[source_B]
        self.max_tokens = self.max_tokens[source_B]

    def collect(self, final_BN: Tensor, from_BN: Tensor, length: int) -> None:
        """Merge N candidates per source into the best K finished hypotheses.

        final_BN: their final scores, -inf for a candidate that is not finished. from_BN: the beam that each candidate
        extends; its first `length` tokens are copied.
        """
        B, K, max_tokens = self.finished_tokens.shape
        tokens = self.finished_tokens.new_full((B, final_BN.shape[1], max_tokens), self.stop)
        tokens[:, :, :length] = self.tokens.gather(1, from_BN[..., None].expand(-1, -1, length))
        self.finished, index = torch.cat((self.finished, final_BN), dim=1).topk(K, dim=1)
        all_tokens = torch.cat((self.finished_tokens, tokens), dim=1)
        self.finished_tokens = all_tokens.gather(1, index[..., None].expand(-1, -1, max_tokens))

    def best(self, source: int) -> list[int]:
        """Return the tokens of the best finished hypothesis."""
        ids = self.finished_tokens[source, 0].tolist()
        return ids[: ids.index(self.stop)] if self.stop in ids else ids


@torch.inference_mode()
def beam(reader: StepReader, stop: int, max_tokens: Sequence[int], beams: int,
         length_penalty: float = 1.0) -> list[list[int]]:  # fmt: skip
    """Return each source's best hypothesis by beam search with `beams` beams, without `stop`.

    A finished hypothesis scores (sum of log p) / length^length_penalty, with `stop` counted in the length, as in
    transformers (Wu et al. 2016, *Google's Neural Machine Translation System*, section 7, use a similar power). A
    source is done when none of its live beams would, at its current length, score better than the worst of `beams`
    finished hypotheses. A hypothesis that reaches its source's `max_tokens` counts as finished.
    """
    sources, K = len(max_tokens), beams
    completions: list[list[int]] = [[] for _ in max_tokens]
    alive, unfinished = list(range(sources)), [True] * sources
    logits_RV = _check_logits(reader.first())
    device = logits_RV.device
    b = _Beams(torch.zeros((sources, 1), device=device), torch.empty((sources, 1, 0), dtype=torch.int64, device=device),
               torch.full((sources, K), -math.inf, device=device),
               torch.full((sources, K, max(max_tokens)), stop, dtype=torch.int64, device=device),
               torch.tensor(max_tokens, device=device), stop)
    for length in range(1, max(max_tokens) + 1):
        score_BN, from_BN, token_BN = _candidates(logits_RV, b.score, 2 * K)
        ends, norm = token_BN == stop, length**length_penalty
        # of the 2 K best candidates, those in the first K that end are finished; the first K of the rest stay live
        counts = ends & (torch.arange(2 * K, device=device) < K)
        b.collect(torch.where(counts, score_BN / norm, -math.inf), from_BN, length - 1)
        b.score, chosen_BK = torch.where(ends, -math.inf, score_BN).topk(K, dim=1)
        from_BK, token_BK = from_BN.gather(1, chosen_BK), token_BN.gather(1, chosen_BK)
        before = b.tokens.gather(1, from_BK[..., None].expand(-1, -1, length - 1))
        b.tokens = torch.cat((before, token_BK[..., None]), dim=2)
        last_B = b.max_tokens == length
        if bool(last_B.any()):
            cut = torch.where(last_B[:, None], b.score / norm, -math.inf)
            b.collect(cut, torch.arange(K, device=device).expand_as(cut), length)
        done_B = (b.finished[:, -1] >= b.score[:, 0] / norm) | last_B
        for row in done_B.nonzero().flatten().tolist():
            if unfinished[row]:
                completions[alive[row]], unfinished[row] = b.best(row), False
        if not any(unfinished):
            break
        if length == 1:
            reader.branch(K)  # all beams extend the only one
        else:
            reader.reorder((torch.arange(len(alive), device=device)[:, None] * K + from_BK).flatten())
        if sum(unfinished) < COMPACT_BELOW * len(alive):
            kept = [row for row, keep in enumerate(unfinished) if keep]
            kept_B = torch.tensor(kept, device=device)
            b.select(kept_B)
            reader.select(kept_B, K)
            token_BK, alive, unfinished = token_BK[kept_B], [alive[row] for row in kept], [True] * len(kept)
        logits_RV = reader.next(token_BK.flatten())
    return completions


def _candidates(logits_RV: Tensor, score_BK: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `number` best continuations of each source: (score, beam it extends, token), each (B, number)."""
    B, V = len(score_BK), logits_RV.shape[-1]
    total_RV = logits_RV.log_softmax(dim=-1).add_(score_BK.reshape(-1, 1))
    score_BN, index_BN = largest(total_RV.view(B, -1), number)  # (R, V) -> (B, K V)
    return score_BN, index_BN // V, index_BN % V


def largest(x_BM: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the `number` largest values of each row, largest first, and their indices (int64): both (B, number).

    Same as `torch.topk`, which is scalar code on a CPU, while `amax` is vectorized. So take the maximum of each chunk
    of a row first: the N largest values are in the N chunks with the largest maxima.
    """
    size = math.gcd(x_BM.shape[1], 64)  # chunk length; 32 to 256 take about the same time
    if x_BM.device.type != "cpu" or size < 16 or x_BM.shape[1] < 2 * number * size:
        return x_BM.topk(number, dim=1)
    x_BPS = x_BM.unflatten(1, (-1, size))  # (B, M) -> (B, chunks, size)
    chunk_BN = x_BPS.amax(dim=2).topk(number, dim=1)[1]
    candidates = x_BPS.gather(1, chunk_BN[..., None].expand(-1, -1, size)).flatten(1)
    value_BN, index_BN = candidates.topk(number, dim=1)
    return value_BN, chunk_BN.gather(1, index_BN // size) * size + index_BN % size


def _check_logits(logits: Tensor) -> Tensor:
    if not math.isfinite(logits.sum(dtype=torch.float32)):  # a NaN or inf anywhere makes the sum NaN or inf
        raise BardletError("the model's logits are not finite: its weights are damaged or training diverged; "
                           "run `bardlet doctor` on its folder")
    return logits
