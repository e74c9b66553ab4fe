"""Sampling from logits: temperature, top-k, top-p, and a random number generator per row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bardlet.errors import BardletError
from bardlet.runtime.seeds import torch_seed


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
    if temperature < GREEDY:
        return logits_BV.argmax(dim=-1)
    if isinstance(generator, Sequence):
        u_B1 = torch.stack([torch.rand(1, generator=row) for row in generator])
    else:
        u_B1 = torch.rand(len(logits_BV), 1, generator=generator)
    return draw(logits_BV, temperature, top_k, top_p, u_B1)


GREEDY = 1e-6
"""Temperature below which the likeliest token is taken: the others have no probability left, unless they tie."""
BLOCK = 256
"""Ids whose probabilities are added up first, where all ids are candidates."""
SMALL = 1024
"""Largest vocabulary that top-p alone sorts in float64."""
BINS = 2048
"""Bins of logits in which the boundary of the nucleus is looked for, in a larger vocabulary."""
LANES = 4
"""Copies of the bins, added up afterwards: adding to the same number again and again waits for each addition."""
FLOOR = -80.0
"""Logits below the maximum by more have the probability 0. exp() is slow where float32 underflows, from -87 on."""


def draw(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, u_B1: Tensor) -> Tensor:
    """Invert the cumulative distribution at u_B1, in [0, 1): the first id whose cumulative probability exceeds it."""
    logits_BV = logits_BV.float()  # of equal logits, the same ones are kept in every dtype
    if temperature < GREEDY:
        return logits_BV.argmax(dim=-1)
    among_all = top_k is None or top_k >= logits_BV.shape[-1]
    if among_all and (top_p is None or top_p >= 1 or logits_BV.shape[-1] > SMALL):
        weight_BV = _weights(logits_BV.detach().to("cpu", torch.float32), temperature, top_p)
        return _draw_from_all(weight_BV, u_B1).to(logits_BV.device)
    index_BK, probability_BK = candidates(logits_BV, temperature, top_k, top_p)
    cumulative_BK = probability_BK.cumsum(dim=-1)
    u_B1 = u_B1.to(cumulative_BK) * cumulative_BK[:, -1:]
    return index_BK.gather(-1, torch.searchsorted(cumulative_BK, u_B1, right=True))[:, 0].to(logits_BV.device)


def candidates(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Return (ids, probabilities) from which `sample_next` samples at a temperature above 0, in the order of the ids.

    K is at least the number of candidates; what top-p leaves out has the probability 0. Where all ids of a large
    vocabulary are candidates, `sample_next` computes the probabilities in float32.

    Returns:
        int64 (B, K) and float64 (B, K), on the CPU: not every accelerator has float64.
    """
    V = logits_BV.shape[-1]
    top_k, top_p = min(V, top_k or V), 1.0 if top_p is None else top_p
    kept_BK, index_BK = logits_BV.topk(top_k, dim=-1, sorted=False)  # exactly k, even with ties
    index_BK, order_BK = index_BK.cpu().sort(dim=-1)
    scaled_BK = _scaled(kept_BK, temperature).gather(-1, order_BK)
    if top_k == V and top_p < 1 and V > SMALL:
        outside_BV = _weights(logits_BV.detach().to("cpu", torch.float32), temperature, top_p)[:, :V] == 0
        return index_BK, scaled_BK.masked_fill_(outside_BV, float("-inf")).softmax(dim=-1)
    return index_BK, _nucleus(scaled_BK, top_p)


def _nucleus(scaled_BK: Tensor, top_p: float) -> Tensor:
    """Return the probabilities of scaled logits, 0 outside the nucleus."""
    scaled_BK, rank_BK = scaled_BK.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        before_BK = F.pad(scaled_BK.softmax(dim=-1).cumsum(dim=-1)[:, :-1], (1, 0))  # probability of the likelier ids
        scaled_BK = scaled_BK.masked_fill(before_BK >= top_p, float("-inf"))
    return torch.empty_like(scaled_BK).scatter_(-1, rank_BK, scaled_BK.softmax(dim=-1))


def draw_on_device(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None,
                   u_B1: Tensor) -> Tensor:
    """Compute `draw` on the device of the logits, which must have float64, for a CUDA graph.

    The shapes depend on no value, and the host reads none. Of equal logits, top-k keeps any.
    """
    logits_BV, index_BK = logits_BV.float(), None
    if temperature < GREEDY:
        return logits_BV.argmax(dim=-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        index_BK = logits_BV.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
        logits_BV = logits_BV.gather(-1, index_BK)
    scaled_BK = logits_BV.double()
    scaled_BK = (scaled_BK - scaled_BK.amax(dim=-1, keepdim=True)) / temperature
    probability_BK = scaled_BK.softmax(dim=-1) if top_p is None or top_p >= 1 else _nucleus(scaled_BK, top_p)
    cumulative_BK = probability_BK.cumsum(dim=-1)
    before_BK = cumulative_BK <= u_B1.double() * cumulative_BK[:, -1:]
    at_B1 = before_BK.sum(dim=-1, keepdim=True).clamp_(max=before_BK.shape[-1] - 1)
    return (at_B1 if index_BK is None else index_BK.gather(-1, at_B1))[:, 0]


def _scaled(logits_BV: Tensor, temperature: float) -> Tensor:
    """Return (logits - their maximum) / temperature, float64 on the CPU."""
    x_BV = logits_BV.to("cpu", torch.float64)
    return x_BV.sub(x_BV.amax(dim=-1, keepdim=True)).div_(temperature)


def _weights(logits_BV: Tensor, temperature: float, top_p: float | None) -> Tensor:
    """Return exp((logits - their maximum) / temperature), float32, 0 outside the nucleus of top-p.

    The rows are padded with 0 to whole blocks, so that a row's place in the batch does not change how it is computed.
    """
    V = logits_BV.shape[-1]
    scaled_BV = logits_BV.new_full((len(logits_BV), V + -V % BLOCK), FLOOR)
    torch.sub(logits_BV, logits_BV.amax(dim=-1, keepdim=True), out=scaled_BV[:, :V])
    scaled_BV[:, :V].div_(temperature).clamp_(min=FLOOR)
    if top_p is None or top_p >= 1:
        return torch.threshold_(scaled_BV.exp_(), 2 * math.exp(FLOOR), 0.0)
    limit = math.log(V / (1 - top_p)) + 1  # ids further below the maximum have together less than 1 - top_p
    width_B = scaled_BV[:, :V].amin(dim=-1).mul_(-1.001).clamp_(0.01, limit).tolist()
    lane_V = torch.arange(LANES, dtype=torch.int32).mul_(BINS + 1).repeat(scaled_BV.shape[-1] // LANES)
    for logits_V, scaled_V, width in zip(logits_BV, scaled_BV, width_B, strict=True):
        _cut_to_nucleus(logits_V, scaled_V, lane_V, width, top_p)  # a row stays in the processor's cache
    return scaled_BV


def _cut_to_nucleus(logits_V: Tensor, scaled_V: Tensor, lane_V: Tensor, width: float, top_p: float) -> None:
    """Replace the scaled logits of a row by their weights, 0 outside the nucleus.

    The scaled logits down to -width fall into bins. Ids above the bin in which the cumulative weight reaches top_p are
    kept, ids below it are not; only the ids in it are sorted.
    """
    bin_V = (scaled_V * (-BINS / width)).clamp_(max=BINS).int()
    weight_V = scaled_V.exp_()
    lanes_LN = torch.bincount(bin_V + lane_V, weight_V.double(), LANES * (BINS + 1)).view(LANES, -1)
    above_N = lanes_LN.sum(dim=0).cumsum(dim=0).numpy()
    target = top_p * above_N[-1]
    boundary = int(above_N.searchsorted(target))
    ids_N = np.flatnonzero(bin_V.numpy() == boundary)
    ids_N = ids_N[np.argsort(-logits_V.numpy()[ids_N], kind="stable")]  # of equal logits, the first id is kept
    weight_N = weight_V.numpy()[ids_N]
    before = above_N[boundary - 1] if boundary else 0.0
    weight_N[1 + weight_N[:-1].cumsum(dtype=np.float64).searchsorted(target - before) :] = 0.0
    torch.threshold_(weight_V, math.exp(-(boundary + 0.5) / BINS * width), 0.0)  # the middle of the bin
    weight_V.numpy()[ids_N] = weight_N


def _draw_from_all(weight_BV: Tensor, u_B1: Tensor) -> Tensor:
    """Draw from all ids: first a block of ids, then an id in it, so that float32 is exact enough for a large V."""
    weight_BNK = weight_BV.unflatten(-1, (-1, BLOCK))
    blocks_BN = weight_BNK.sum(dim=-1).double().cumsum(dim=-1)
    target_B1 = u_B1.to(blocks_BN) * blocks_BN[:, -1:]
    block_B1 = torch.searchsorted(blocks_BN, target_B1, right=True).clamp_(max=blocks_BN.shape[-1] - 1)
    start_B1 = F.pad(blocks_BN, (1, 0)).gather(-1, block_B1)
    inside_BK = weight_BNK[torch.arange(len(weight_BNK)), block_B1[:, 0]].double().cumsum(dim=-1)
    target_B1 = torch.minimum(target_B1 - start_B1, inside_BK[:, -1:] * (1 - 2**-52))  # rounding of the two sums
    return (block_B1 * BLOCK + torch.searchsorted(inside_BK, target_B1, right=True))[:, 0]


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """Return a seed for each row: derived from an int, a sequence as given, or from the operating system for None."""
    if seed is None:
        return [torch.Generator().seed() for _ in range(rows)]
    if isinstance(seed, int):  # far apart: seeds 1 and 2 share no row seeds
        return [(torch_seed(seed) * 1_000_003 + row) % 2**63 for row in range(rows)]
    if len(seed) != rows:
        raise BardletError(f"{len(seed)} seeds for {rows} prompts; give one seed, or one for each prompt")
    return list(seed)


def check_finite(logits: Tensor) -> None:
    """Raise BardletError if a logit is not finite."""
    if not math.isfinite(logits.sum(dtype=torch.float32)):  # a NaN or inf anywhere makes the sum NaN or inf
        raise not_finite()


def not_finite() -> BardletError:
    """Return the error of logits that are not finite."""
    return BardletError("the model's logits are not finite: its weights are damaged or training diverged; "
                        "run `bardlet doctor` on its folder")
