"""Initialize a model that no process could hold: each draws all its numbers, and keeps its share of them.

A model's constructor draws its weights one after the other from torch's generator, some of them twice. Here it runs on
the meta device, where tensors take no memory. A dispatch mode catches the operations that fill a tensor, carries
them out on one real tensor at a time, and keeps this rank's rows. So the shares are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bardlet.runtime import parallelize
from bardlet.runtime.device import return_large_blocks
from bardlet.runtime.distributed import Dist

aten = torch.ops.aten
FILLS = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar}
"""Operations that fill a tensor with numbers."""
CREATES = {aten.ones.default: 1.0, aten.zeros.default: 0.0}
"""Operations that create a tensor of one number."""


class Filling(TorchDispatchMode):
    """Keeps some rows of every tensor on the meta device that is filled."""

    def __init__(self, rows_of: Callable[[Tensor], Tensor]) -> None:
        """rows_of: returns the rows of a whole tensor to keep."""
        super().__init__()
        self._rows_of = rows_of
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FILLS and args[0].is_meta:
            target = args[0]
            whole = torch.empty(target.shape, dtype=target.dtype, device="cpu")
            func(whole, *args[1:], **(kwargs or {}))
            self._keep(target, whole)
            return target
        result = func(*args, **(kwargs or {}))
        if func in CREATES and result.is_meta:
            self._keep(result, torch.full(result.shape, CREATES[func], dtype=result.dtype, device="cpu"))
        return result

    def _keep(self, target: Tensor, whole: Tensor) -> None:
        # a tensor on the meta device has a storage, too; while it is here, no other one has its address
        self._kept[target.untyped_storage()._cdata] = target, self._rows_of(whole).clone()

    def take(self, target: Tensor) -> Tensor:
        """Return the rows of a filled tensor, and forget them."""
        return self._kept.pop(target.untyped_storage()._cdata)[1]


def build(constructor: Callable[[], nn.Module], dist: Dist, dtype: str, ranks_per_copy: int) -> nn.Module:
    """Return a sharded model whose shares are those of the whole model that `constructor` would create here.

    Args:
        constructor: draws from torch's global generator, which has the same state on all ranks.
        dtype, ranks_per_copy: see `parallelize.shard`.
    """
    return_large_blocks()
    filling = Filling(lambda whole: parallelize.rows_of_rank(whole, dist.rank % ranks_per_copy, ranks_per_copy))
    with torch.device("meta"), filling:
        model = constructor()
    rows = {name: filling.take(p) for name, p in model.named_parameters()}
    parallelize.shard(model, dist, dtype, ranks_per_copy)
    parallelize.materialize(model, dist.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            parallelize.local(p).copy_(rows.pop(name))
    return model
