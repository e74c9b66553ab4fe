"""The most probable continuation: greedy and beam search, for an encoder-decoder and for a decoder-only model alike.

Ids in, ids out. A `Reader` holds what a model has read of each source; the search only sees logits. Shape suffixes:
B sources, K beams of a source, R rows (B K of them, the beams of a source side by side), V vocabulary.
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
    """What a model has read: a row for each beam of each source, and the logits of its next token."""

    def first(self) -> Tensor:
        """Reads the sources: the logits of the first token of each, (B, V)."""

    def branch(self, beams: int) -> None:
        """Makes `beams` rows of each source, which had one."""

    def next(self, idx_R: Tensor) -> Tensor:
        """Reads one more token (int64) of each row: the logits of the one after it, (R, V)."""

    def reorder(self, row_R: Tensor) -> None:
        """Goes on with these rows (int64), in this order; each stays with its source."""

    def select(self, source_B: Tensor, beams: int) -> None:
        """Goes on with these sources (int64, ascending) alone, all their beams with them."""


CANDIDATES = 7 / 8
"""Sources that are done stay among the others until fewer than this part is left: to move rows takes time, too."""


@torch.inference_mode()
def greedy(reader: StepReader, stop: int, most: Sequence[int]) -> list[list[int]]:
    """The likeliest token again and again: for each source up to `stop`, which is left out, or up to its `most`."""
    made: list[list[int]] = [[] for _ in most]
    alive, going = list(range(len(most))), [True] * len(most)
    logits_BV = _check_logits(reader.first())
    while True:
        idx_B = largest(logits_BV, 1)[1][:, 0]
        for place, (source, token) in enumerate(zip(alive, idx_B.tolist(), strict=True)):
            if going[place] and token != stop:
                made[source].append(token)
            going[place] = going[place] and token != stop and len(made[source]) < most[source]
        if not any(going):
            return made
        if sum(going) < CANDIDATES * len(alive):
            places = [place for place, goes in enumerate(going) if goes]
            rows = torch.tensor(places, device=idx_B.device)
            reader.select(rows, 1)
            idx_B, alive, going = idx_B[rows], [alive[place] for place in places], [True] * len(places)
        logits_BV = reader.next(idx_B)


@dataclass
class _Beams:
    """Of B sources still searched: K beams each, and the best K that have ended."""

    score: Tensor
    """(B, K): the sum of log p over the tokens of a beam."""
    tokens: Tensor
    """(B, K, t) int64."""
    ended: Tensor
    """(B, K): the score of each beam that ended, divided by its length; -inf where there is none yet."""
    ended_tokens: Tensor
    """(B, K, most) int64, with `stop` behind the last."""
    most: Tensor
    """(B,): how many tokens each source may get."""
    stop: int

    def select(self, source_B: Tensor) -> None:
        """Goes on with these sources alone."""
        self.score, self.tokens = self.score[source_B], self.tokens[source_B]
        self.ended, self.ended_tokens = self.ended[source_B], self.ended_tokens[source_B]
        self.most = self.most[source_B]

    def collect(self, final_BN: Tensor, from_BN: Tensor, length: int) -> None:
        """Puts what ends, N candidates, among the best K that have ended.

        final_BN: their final scores, -inf for one that does not end. from_BN: the beam that each goes on from, of which
        the first `length` tokens count.
        """
        B, K, most = self.ended_tokens.shape
        tokens = self.ended_tokens.new_full((B, final_BN.shape[1], most), self.stop)
        tokens[:, :, :length] = self.tokens.gather(1, from_BN[..., None].expand(-1, -1, length))
        self.ended, place = torch.cat((self.ended, final_BN), dim=1).topk(K, dim=1)
        all_tokens = torch.cat((self.ended_tokens, tokens), dim=1)
        self.ended_tokens = all_tokens.gather(1, place[..., None].expand(-1, -1, most))

    def best(self, source: int) -> list[int]:
        """The tokens of the best that has ended."""
        ids = self.ended_tokens[source, 0].tolist()
        return ids[: ids.index(self.stop)] if self.stop in ids else ids


@torch.inference_mode()
def beam(reader: StepReader, stop: int, most: Sequence[int], beams: int, length_penalty: float = 1.0) -> list[list[int]]:
    """The best of `beams` hypotheses that are followed side by side: for each source its tokens, without `stop`.

    A hypothesis that ends has the score (sum of log p) / length^length_penalty, `stop` counted as a token (as
    transformers has it; Wu et al. 2016, *Google's Neural Machine Translation System*, section 7, divide by a like
    power). A source is done when none of its beams, as it stands, would score better than the worst of `beams` that
    have ended; a hypothesis that has not ended after its source's `most` tokens is cut, and is one of them.
    """
    sources, K = len(most), beams
    made: list[list[int]] = [[] for _ in most]
    alive, going = list(range(sources)), [True] * sources
    logits_RV = _check_logits(reader.first())
    device = logits_RV.device
    b = _Beams(torch.zeros((sources, 1), device=device), torch.empty((sources, 1, 0), dtype=torch.int64, device=device),
               torch.full((sources, K), -math.inf, device=device),
               torch.full((sources, K, max(most)), stop, dtype=torch.int64, device=device),
               torch.tensor(most, device=device), stop)
    for length in range(1, max(most) + 1):
        score_BN, from_BN, token_BN = _candidates(logits_RV, b.score, 2 * K)
        ends, share = token_BN == stop, length**length_penalty
        # of the 2 K best, what ends among the first K has ended; of the others the first K go on
        counts = ends & (torch.arange(2 * K, device=device) < K)
        b.collect(torch.where(counts, score_BN / share, -math.inf), from_BN, length - 1)
        b.score, chosen_BK = torch.where(ends, -math.inf, score_BN).topk(K, dim=1)
        from_BK, token_BK = from_BN.gather(1, chosen_BK), token_BN.gather(1, chosen_BK)
        before = b.tokens.gather(1, from_BK[..., None].expand(-1, -1, length - 1))
        b.tokens = torch.cat((before, token_BK[..., None]), dim=2)
        last_B = b.most == length
        if bool(last_B.any()):
            cut = torch.where(last_B[:, None], b.score / share, -math.inf)
            b.collect(cut, torch.arange(K, device=device).expand_as(cut), length)
        done_B = (b.ended[:, -1] >= b.score[:, 0] / share) | last_B
        for place in done_B.nonzero().flatten().tolist():
            if going[place]:
                made[alive[place]], going[place] = b.best(place), False
        if not any(going):
            break
        if length == 1:
            reader.branch(K)  # all beams go on from the only one
        else:
            reader.reorder((torch.arange(len(alive), device=device)[:, None] * K + from_BK).flatten())
        if sum(going) < CANDIDATES * len(alive):
            places = [place for place, goes in enumerate(going) if goes]
            going_B = torch.tensor(places, device=device)
            b.select(going_B)
            reader.select(going_B, K)
            token_BK, alive, going = token_BK[going_B], [alive[place] for place in places], [True] * len(places)
        logits_RV = reader.next(token_BK.flatten())
    return made


def _candidates(logits_RV: Tensor, score_BK: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `number` best continuations of each source: (score, beam that it continues, token), each (B, number)."""
    B, V = len(score_BK), logits_RV.shape[-1]
    total_RV = logits_RV.log_softmax(dim=-1).add_(score_BK.reshape(-1, 1))
    score_BN, place_BN = largest(total_RV.view(B, -1), number)  # (R, V) -> (B, K V)
    return score_BN, place_BN // V, place_BN % V


def largest(x_BM: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` largest of each row, largest first, and their places (int64): both (B, number). As `torch.topk`.

    On a CPU that looks at one number after the other, but a maximum at a vector of them: so the maximum of each piece
    of a row is found first. The N largest lie in the N pieces with the largest maxima.
    """
    size = math.gcd(x_BM.shape[1], 64)  # of a piece: from 32 to 256 numbers took about the same time
    if x_BM.device.type != "cpu" or size < 16 or x_BM.shape[1] < 2 * number * size:
        return x_BM.topk(number, dim=1)
    x_BPS = x_BM.unflatten(1, (-1, size))  # (B, M) -> (B, pieces, size)
    piece_BN = x_BPS.amax(dim=2).topk(number, dim=1)[1]
    near = x_BPS.gather(1, piece_BN[..., None].expand(-1, -1, size)).flatten(1)
    value_BN, place_BN = near.topk(number, dim=1)
    return value_BN, piece_BN.gather(1, place_BN // size) * size + place_BN % size


def _check_logits(logits: Tensor) -> Tensor:
    if not math.isfinite(logits.sum(dtype=torch.float32)):  # one number tells it of all
        raise BardletError("the model's logits are not finite: its weights are damaged, or its training diverged")
    return logits
