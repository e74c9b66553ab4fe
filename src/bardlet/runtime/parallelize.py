"""Prepare a plain model for several processes, from outside: the models know nothing of it.

If each process has room for the model, all keep a copy, and DistributedDataParallel adds up their gradients. Otherwise
the model is sharded: each process keeps a share of every weight, of its gradient and of its optimizer state. The engine
is PyTorch's `fully_shard` (FSDP2: Zhao et al. 2023, *PyTorch FSDP*). A block's weights are gathered just before they
are needed and freed after it; gradients are added up and cut into shares at once. The parameters become DTensors, cut
along their first dimension.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bardlet.models.base import Lazy
from bardlet.runtime import compiler
from bardlet.runtime.device import HALF
from bardlet.runtime.distributed import Dist

PIECE = 1 << 22
"""Numbers of a sharded tensor that rank 0 receives at a time."""

# ---------------------------------------------------------------- copies of a model


def wrap(model: nn.Module, dist: Dist) -> nn.Module:
    """Return what a training step calls: `model` in DistributedDataParallel if there are copies of it, else itself.

    With slices, their gradients are added up outside: the model itself.
    """
    if dist.world == 1 or dist.slices or is_sharded(model):
        return model
    # the gradients are added up where they are, and a compiled block stays one graph, whatever the buckets are
    torch._dynamo.config.optimize_ddp = False
    ids = [dist.device.index] if dist.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def micro_batch(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return a context for a micro-batch of the `model` that `wrap` returned: copies add up gradients in the last one.
    """
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[Any], model.no_sync())


# ---------------------------------------------------------------- computing activations again


def recompute(model: nn.Module, on: bool = True) -> None:
    """Have each block compute its activations again in the backward pass instead of keeping them, or undo that.

    Only what enters a block is kept, for a third more time; dropout drops the same. (Chen et al. 2016, *Training Deep
    Nets with Sublinear Memory Cost*.)
    """
    for block in compiler.blocks(model):
        forward = _own_forward(block)
        block.forward = partial(checkpoint, forward, use_reentrant=False) if on else forward


def _own_forward(block: nn.Module) -> Any:
    """Return the forward method of a block's class, whatever `recompute` put in its place."""
    return type(block).forward.__get__(block)


@contextmanager
def last_block_keeps(model: nn.Module) -> Iterator[None]:
    """Have the last block of a model, if it has any, keep its activations after all: as while they are computed again.
    """
    kept = list(compiler.blocks(model))[-1:]
    again = [block.forward for block in kept]
    for block in kept:
        block.forward = _own_forward(block)
    try:
        yield
    finally:
        for block, forward in zip(kept, again, strict=True):
            block.forward = forward


# ---------------------------------------------------------------- sharding a model


def shard(model: nn.Module, dist: Dist, dtype: str, ranks_per_copy: int) -> None:
    """Cut every parameter of `model` among the ranks, in place.

    Args:
        dtype: fp32, bf16 or fp16: in which weights are gathered. Gradients are summed in fp32 (those of fp64 weights in
            fp64), and a rank's share of a weight keeps its dtype.
        ranks_per_copy: neighbors that share one copy of the model; if not all ranks, there are several copies (HSDP).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # nothing is changed in place here
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    gathered = HALF.get(dtype)
    policy = MixedPrecisionPolicy(gathered, torch.float32 if gathered else None, cast_forward_inputs=False)
    mesh = _mesh(dist, ranks_per_copy)
    blocks = list(compiler.blocks(model))
    # a decoder block's keys and values of the source are computed before the block's own turn
    sources = [block.encoder_attn for block in cast(list[Any], blocks) if hasattr(block, "encoder_attn")]
    parts: list[Any] = [*([source.k_proj, source.v_proj] for source in sources), *blocks, model]
    for module in parts:
        # also for the root, which PyTorch would leave gathered, its parameters whole, after an evaluation
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def materialize(model: nn.Module, device: torch.device) -> nn.Module:
    """Give memory to a model on the meta device, for its shares if it is sharded; its weights have any content."""
    model.to_empty(device=device)
    fill_buffers(model)
    return model


def fill_buffers(model: nn.Module) -> None:
    """Compute what a model keeps besides its weights, if anything."""
    for part in cast(Iterable[Any], model.modules()):
        if hasattr(part, "fill_buffers"):
            part.fill_buffers()


def has_unknown_buffers(model: nn.Module) -> bool:
    """Return True if only its constructor can fill what a model keeps besides its weights, as in the lecture's."""
    return any(list(part.buffers(recurse=False)) for part in model.modules() if not hasattr(part, "fill_buffers"))


def _mesh(dist: Dist, ranks_per_copy: int) -> Any:
    """Return the ranks in one row, or in a row for each copy of the model."""
    from torch.distributed.device_mesh import init_device_mesh

    copies = dist.world // ranks_per_copy
    shape, names = ((copies, ranks_per_copy), ("copies", "shares")) if copies > 1 else ((dist.world,), ("shares",))
    return init_device_mesh(dist.device.type, shape, mesh_dim_names=names)


def is_sharded(model: nn.Module) -> bool:
    """Return True if `shard` cut this model's parameters."""
    return any(True for _ in _sharded_parts(model))


def _sharded_parts(model: nn.Module) -> Iterator[Any]:
    """Yield the submodules whose weights are gathered together."""
    if "torch.distributed.fsdp" not in sys.modules:  # importing it takes a second
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (part for part in model.modules() if isinstance(part, FSDPModule))


def largest_part(model: nn.Module) -> int:
    """Return the parameters of the largest part that is gathered at a time; 0 if the model is not sharded."""
    parts = list(_sharded_parts(model))
    owned = {id(p): index for index, part in enumerate(parts) for p in part.parameters()}  # the innermost comes last
    sizes = Counter[int]()
    for p in model.parameters():
        if id(p) in owned:
            sizes[owned[id(p)]] += p.numel()
    return max(sizes.values(), default=0)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a sharded model on every rank inside the `with` block; a plain model stays as it is.

    All ranks must enter it. Inside, each may use the model alone, as if it were plain, but not train it.
    """
    parts = list(_sharded_parts(model))
    hooks = [(part._forward_pre_hooks.copy(), part._forward_hooks.copy()) for part in parts]
    for part in parts:
        part.unshard()
        # they would gather and free weights, and note an order of use that other ranks do not share
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    try:
        yield
    finally:
        for part, (before, after) in zip(parts, hooks, strict=True):
            part._forward_pre_hooks.update(before)
            part._forward_hooks.update(after)
            part.reshard()


# ---------------------------------------------------------------- sharded tensors


def local(tensor: Any) -> Tensor:
    """Return this rank's share of a sharded tensor, which shares its memory; a plain tensor is its own share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def pieces(tensor: Any) -> Iterator[Tensor]:
    """Yield the numbers of a tensor on rank 0, in pieces and in their order; all ranks must iterate over it.

    Only a tensor that is cut along another dimension than the first is gathered as a whole.
    """
    if not hasattr(tensor, "placements"):
        yield tensor
        return
    if not tensor.placements[-1].is_shard(0):
        yield tensor.full_tensor()
        return
    group, rows = shares_of(tensor)
    ranks, own = torch.distributed.get_process_group_ranks(group), local(tensor)
    if ranks[0] != 0:  # rank 0 has all rows from its own copy of the model
        return
    count = max(1, PIECE // max(1, own[:1].numel()))
    for rank, held in zip(ranks, rows, strict=True):
        for first in range(0, held, count):
            size = min(count, held - first)
            if rank == group.rank():
                if rank:
                    torch.distributed.send(own[first : first + size].contiguous(), 0)
                else:
                    yield own[first : first + size]
            elif ranks[0] == group.rank():
                piece = own.new_empty((size, *tensor.shape[1:]))
                torch.distributed.recv(piece, rank)
                yield piece


def cut_like(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor cut as `like` is; the tensor itself if it is cut already, or `like` is not sharded."""
    if not hasattr(like, "device_mesh") or hasattr(tensor, "device_mesh"):
        return tensor
    return _on_all(tensor, like.device_mesh).redistribute(placements=like.placements)


def _on_all(tensor: Tensor, mesh: Any) -> Any:
    """Return a DTensor of a whole tensor that is equal on all ranks of a mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)


def rows_of_rank(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Return the rows of a whole tensor that `shard` gives to one of `ranks`."""
    held = _held(len(whole), ranks)
    first = sum(held[:rank])
    return whole[first : first + held[rank]]


def _held(rows: int, ranks: int) -> list[int]:
    """Return how many of a tensor's rows `shard` gives to each rank: equally many, but fewer or none to the last."""
    each = -(-rows // ranks)
    return [max(0, min(each, rows - rank * each)) for rank in range(ranks)]


def first_row(tensor: Any) -> int:
    """Return the number of the first row that this rank holds of a sharded tensor."""
    group, rows = shares_of(tensor)
    return sum(rows[: group.rank()])


def as_share(rows: Tensor, like: Any) -> Any:
    """Return a tensor that is sharded as `like` is, of which this rank holds `rows`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())


def shares_of(tensor: Any) -> tuple[Any, list[int]]:
    """Return (process group, rows): the ranks that hold a copy of a sharded tensor, and how many rows each has."""
    mesh = shares_mesh(tensor.device_mesh)
    return mesh.get_group(), _held(len(tensor), mesh.size())


def shares_mesh(mesh: Any) -> Any:
    """Return the ranks of `mesh` that hold one copy of a model together with this one."""
    return mesh if mesh.ndim == 1 else mesh["shares"]


def exchange(sent: Tensor, sizes: list[int], sizes_back: list[int], group: Any) -> Tensor:
    """Send `sizes[r]` numbers of a vector to each rank r of a group, and return those that came, in their order."""
    received = sent.new_empty(sum(sizes_back))
    torch.distributed.all_to_all_single(received, sent, sizes_back, sizes, group=group)
    return received


def on_all_ranks(tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return whole tensors, equal on all ranks, in a form that a sharded model can copy its shares from."""
    if not is_sharded(model):
        return tensors
    mesh, compared = cast(Any, next(model.parameters())).device_mesh, getattr(model, "compared", ())
    return Lazy(tensors, lambda name: tensors[name] if name in compared else _on_all(tensors[name], mesh))


# ---------------------------------------------------------------- gradients


def squared_norm(parameters: Sequence[Any]) -> Tensor:
    """Return a float64 scalar whose sum over the ranks is the squared norm of sharded parameters' gradients."""
    mesh = parameters[0].device_mesh
    copies = mesh.size() // shares_mesh(mesh).size()
    return nn.utils.get_total_norm([local(p.grad) for p in parameters]).double().square() / copies


def clip(parameters: Sequence[Any], norm: Tensor, maximum: float) -> None:
    """Scale the gradients of sharded parameters, whose norm is `norm`, so that it is at most `maximum`."""
    torch._foreach_mul_([local(p.grad) for p in parameters], (maximum / (norm + 1e-6)).clamp(max=1))
