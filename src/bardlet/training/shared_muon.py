"""Muon on several processes, each of which orthogonalizes a share of the matrices.

The products of Muon's Newton-Schulz steps are most of its work, and need whole matrices. Copies of a model exchange the
results. Of a sharded model, the shares of a matrix travel to the process that orthogonalizes it, and those of the
result back (as in the baseline of Ahn et al. 2025, *Dion: Distributed Orthonormalized Updates*).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bardlet.runtime import parallelize
from bardlet.runtime.device import pick_dtype
from bardlet.runtime.distributed import Dist
from bardlet.training.optimizers import Muon, orthogonalize

ROUND_BYTES = 1 << 26
"""Bytes of the matrices that are exchanged at a time, unless one for each process takes more."""


class SharedMuon(Muon):
    """Muon whose work is divided among processes, all of which must create it and call `step`.

    With slices (--elastic), each matrix is a product of its own, even on one process: the bits of a batched product
    depend on the number of matrices.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, dist: Dist) -> None:
        super().__init__(params, lr, weight_decay)
        self.dist = dist
        self.bf16 = bool(dist.all_min(int(pick_dtype("auto", dist.device) == "bf16")))  # machines may differ
        self.matrix: Any = None
        """One of the matrices that are being updated."""

    def _update(self, weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor],
                group: dict[str, Any]) -> None:
        """Update matrices that share a shape, as many at a time as ROUND_BYTES allow; of sharded ones, some rows."""
        self.matrix, world = weights[0], self.dist.world
        size = world * max(1, ROUND_BYTES // (world * 4 * weights[0].numel()))
        for first in range(0, len(weights), size):
            rows = [[parallelize.local(x) for x in all_of_them[first : first + size]]
                    for all_of_them in (weights, grads, momenta)]
            super()._update(rows[0], rows[1], rows[2], group)

    def _scale(self, weight: Tensor) -> float:
        return super()._scale(self.matrix)

    def _directions(self, nesterov_NRC: Tensor, moving_N: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self.bf16 and nesterov_NRC.dtype == torch.float32 else nesterov_NRC.dtype
        if parallelize.local(self.matrix) is self.matrix:
            updates_NRC = self._of_copies(nesterov_NRC.to(dtype))
        else:
            updates_NRC, moving_N = self._of_shares(nesterov_NRC.to(dtype), moving_N)
        return updates_NRC.to(nesterov_NRC.dtype), moving_N

    def _of_copies(self, nesterov_NRC: Tensor) -> Tensor:
        """Return the orthogonalized matrices, of which each process computes every `world`-th."""
        world, N = self.dist.world, len(nesterov_NRC)
        own_NRC = nesterov_NRC.new_zeros((-(-N // world), *nesterov_NRC.shape[1:]))
        mine = range(self.dist.rank, N, world)
        together = 1 if self.dist.slices else max(1, len(mine))
        for first in range(0, len(mine), together):
            own_NRC[first : first + together] = orthogonalize(nesterov_NRC[list(mine[first : first + together])],
                                                              nesterov_NRC.dtype)
        return self.dist.gather(own_NRC).transpose(0, 1).flatten(0, 1)[:N]

    def _of_shares(self, nesterov_NRC: Tensor, moving_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return this process's rows of the orthogonalized matrices, and which of them have a gradient anywhere.

        Args:
            nesterov_NRC: this process's rows of the matrices, perhaps none.
            moving_N: which of them have a gradient here.
        """
        group, rows = parallelize.shares_of(self.matrix)
        me, width, N = group.rank(), nesterov_NRC.shape[2], len(nesterov_NRC)
        owned = [len(range(rank, N, group.size())) for rank in range(group.size())]
        sent = [number * (rows[me] * width + 1) for number in owned]  # to each owner: my rows, and one flag for each
        received = [owned[me] * (count * width + 1) for count in rows]
        payload_NX = torch.cat((nesterov_NRC.flatten(1), moving_N[:, None]), 1)
        order = [n for rank in range(group.size()) for n in range(rank, N, group.size())]
        arrived = parallelize.exchange(payload_NX[order].flatten(), sent, received, group)
        pieces = [x.view(owned[me], count * width + 1)
                  for x, count in zip(arrived.split(received), rows, strict=True)]
        whole_NRC = torch.cat([x[:, :-1].reshape(owned[me], count, width)
                               for x, count in zip(pieces, rows, strict=True)], 1)
        moves_N1 = torch.stack([x[:, -1:] for x in pieces]).amax(0)
        if owned[me]:
            whole_NRC = orthogonalize(whole_NRC, whole_NRC.dtype)
        answer = torch.cat([torch.cat((part.flatten(1), moves_N1), 1).flatten() for part in whole_NRC.split(rows, 1)])
        returned_NX = parallelize.exchange(answer, received, sent, group).view(N, -1)
        result_NX = torch.empty_like(returned_NX)
        result_NX[order] = returned_NX
        return result_NX[:, :-1].view(nesterov_NRC.shape), result_NX[:, -1] > 0
