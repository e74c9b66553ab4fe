"""Free memory, and micro-batches that fit into it, so that no run goes out of memory.

The memory of a training step grows by a constant with every row (window) of a micro-batch. That constant is measured
before the first step. If --batch-size rows do not fit, the step is split into more and smaller micro-batches: the same
windows, the same summed loss, the same step.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.config.settings import flag
from bardlet.data.batch import Batch
from bardlet.errors import BardletError, is_out_of_memory
from bardlet.evaluation import metrics
from bardlet.models.layers import on_meta_device
from bardlet.ops.cross_entropy import rows_per_chunk
from bardlet.runtime import parallelize
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.training import optim
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")

SHARE = 0.6
"""Share of the free memory, less what a run keeps, that micro-batches may use: other programs also run here, and the
compiler needs a few hundred megabytes."""

LATER = 100_000_000
"""Bytes reserved for libraries that a run imports later; matplotlib is the largest."""

UPDATE = 24
"""Bytes per trained parameter outside the micro-batches: Muon's copies (in fp32; 20 in bf16)."""

RESULT = 12
"""Bytes per parameter at the end of a run: the result is read again, and its weights are merged in fp32."""

TRAINED = 16
"""Bytes per parameter in training: itself, its gradient, and AdamW's two averages."""

GATHERED = 12
"""Bytes per parameter of a part of a sharded model that is gathered: itself, its gradient, and a buffer for both."""

LOGIT = 16
"""Bytes per logit that `linear_cross_entropy` holds at once: as computed, in float32, its gradient, and as much again
for heap fragmentation."""

SMALL_FREE = 0.2
"""A run whose upper bound is below this share of the free memory is not measured."""

HEAP = {"cpu": (1.8, 6.0), "cuda": (1.1, 3.0)}
"""(a, b): a row needs a times what it saves for the backward pass, plus b times its largest saved tensor in float32."""

# ---------------------------------------------------------------- free memory


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes this process can still allocate on `device`; None if unknown, as on Apple's GPUs.

    On a CPU it is the smallest of: Linux's MemAvailable, the rest of each cgroup limit (v1 or v2; cached files count as
    free), and the rest of the address space (ulimit -v). Without any of these, half of the physical memory counts as
    free. On a GPU it is what the driver reports, plus what PyTorch has reserved but does not use.

    Args:
        root: folder that contains /proc and /sys.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    candidates = _free_in_cgroups(root)
    with suppress(OSError, KeyError):
        candidates.append(1024 * _read_table(root / "proc/meminfo")["MemAvailable:"])
    with suppress(ImportError, OSError):
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            candidates.append(limit - used)
    if not candidates:
        with suppress(AttributeError, OSError, ValueError):  # macOS; Windows has no sysconf
            candidates.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(candidates)) if candidates else None


def _free_in_cgroups(root: Path) -> list[int]:
    """Return the bytes left in each cgroup of this process that has a limit."""
    free: list[int] = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            v1 = "memory" in controllers.split(",")  # v1 has a tree per controller, v2 a single one
            if controllers and not v1:
                continue
            base = root / ("sys/fs/cgroup/memory" if v1 else "sys/fs/cgroup")
            limit_name, usage_name = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):  # the parents' limits apply, too
                folder = base / str(group).lstrip("/")
                with suppress(OSError, ValueError, KeyError):  # no such file, or "max": no limit
                    limit = int((folder / f"memory.{limit_name}").read_text())
                    stat = _read_table(folder / "memory.stat")
                    cached = sum(stat[f"{'total_' * v1}{kind}_file"] for kind in ("active", "inactive"))
                    free.append(limit - int((folder / f"memory.{usage_name}").read_text()) + cached)
    return free


def _read_table(path: Path) -> dict[str, int]:
    """Read a kernel file of lines `NAME NUMBER ...`."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {fields[0]: int(fields[1]) for fields in lines}


# ---------------------------------------------------------------- memory of a run


def fixed_bytes(trainer: Trainer) -> int:
    """Return the bytes a run keeps besides its weights, independent of the micro-batch size.

    Gradients, optimizer state, a copy of the weights (while timing steps; later their average) and DDP's gradient
    buckets for the weights that are trained, a copy of fp32 weights in bf16, the gradient of the head while it is
    accumulated, and on a CPU the windows of a step and LATER. Of a sharded model, a share of all that, and GATHERED for
    two parts at once: one is in use while the next one arrives.
    """
    state = sum(parallelize.local(p).numel() * len(optim.state_keys(optimizer) - {"step"})
                for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"])
    largest = parallelize.largest_part(trainer.model)
    copies = 2 + (trainer.dist.world > 1 and not largest)
    if trainer.dist.slices and not largest:  # sums of subtrees, and one more of another process
        copies += len(trainer.dist.own_parts).bit_length()
    host = _windows(trainer) + LATER if trainer.dist.device.type == "cpu" else 0
    shared = 2 * GATHERED * largest if largest else _rounded(trainer)
    return 4 * (copies * _trained(trainer) + state) + shared + 2 * _head_gradient(trainer) + host


def _head(trainer: Trainer) -> torch.Tensor | None:
    """Return the head whose logits `linear_cross_entropy` computes in chunks.

    None if the loss holds all logits: for the lecture's models, and in preference and reward stages.
    """
    head: torch.Tensor | None = None if trainer.objective.all_logits else getattr(trainer.model, "head", None)
    return head


def _head_gradient(trainer: Trainer) -> int:
    """Return the bytes of the head's gradient that `linear_cross_entropy` saves; at its peak there are two copies."""
    head = _head(trainer)
    return 4 * head.numel() if head is not None and head.requires_grad else 0


def _logits(trainer: Trainer, width: int) -> tuple[int, int]:
    """Return (bytes per row of `width` tokens, maximum bytes) of the logits `linear_cross_entropy` holds at once."""
    if (head := _head(trainer)) is None:
        return 0, 0
    per_token = LOGIT * len(head)
    maximum = per_token * rows_per_chunk(len(head), trainer.dist.device, head.requires_grad)
    return min(per_token * width, maximum), maximum


def _parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.model.parameters())


def _trained(trainer: Trainer) -> int:
    """Return the number of parameters that are trained here: with LoRA, its factors; of shards, this process's."""
    return sum(parallelize.local(p).numel() for p in trainer.model.parameters() if p.requires_grad)


def _outside(trainer: Trainer) -> int:
    """Return the bytes that a run needs outside its micro-batches: in an update, or at its end."""
    return max(UPDATE * _trained(trainer), RESULT * _parameters(trainer))


def _rounded(trainer: Trainer) -> int:
    """Return the bytes of fp32 weights in bf16 or fp16, if products are."""
    if trainer.machine["dtype"] == "fp32":
        return 0
    return sum(2 * p.numel() for p in trainer.model.parameters() if p.dtype != torch.bfloat16)


def _windows(trainer: Trainer) -> int:
    """Return the bytes of the global batch while it is assembled: tokens, targets, positions and copies."""
    return 40 * trainer.config.tokens_per_step


def _micro_batch(trainer: Trainer) -> tuple[int, int]:
    """Return (rows, tokens per row) of a rank's largest micro-batch."""
    if trainer.objective.widest is None:
        width = trainer.config.block_size
        return trainer.config.tokens_per_step // trainer.config.grad_accum // width // trainer.dist.parts, width
    rows, *widths = trainer.objective.widest()["target"].shape  # preferences have two completions per row
    return rows // (trainer.config.grad_accum * trainer.dist.parts), math.prod(widths)


def upper_bound(trainer: Trainer) -> int:
    """Return a generous upper bound on a run's bytes besides its weights, from a formula, without measuring.

    `fixed_bytes`, `_outside`, and per token of a micro-batch 4 (L (30 C + 16 I + 10 H T) + 60 C + 20 V):
    L layers, C channels, I inner channels, H heads, T positions, V vocabulary size (all logits may be held at once).
    """
    return fixed_bytes(trainer) + _outside(trainer) + _micro_batch(trainer)[0] * row_bound(trainer)


def row_bound(trainer: Trainer) -> int:
    """Return the bytes of a micro-batch's row in `upper_bound`."""
    m, (_, T) = trainer.model.config, _micro_batch(trainer)
    # a decoder block with cross-attention takes nearly as much as two
    blocks = 2 * m.n_layer + m.n_encoder_layer if m.n_encoder_layer else m.n_layer
    layers = 30 * m.n_embd + 16 * m.n_inner + 10 * m.n_head * T
    # activations that are computed again are there for one block, and of the others what enters it
    layers = layers + 2 * blocks * m.n_embd if trainer.config.recompute == "on" else blocks * layers
    per_token = 4 * (layers + 60 * m.n_embd + 20 * m.vocab_size)
    return T * per_token


def saved_tensors(trainer: Trainer, batch: Batch, limit: float = math.inf) -> list[tuple[int, int]]:
    """Return (bytes, bytes as float32) of each tensor that a forward pass of `batch` saves for the backward pass.

    Each storage counts once, parameters not at all. Nothing is kept for a backward pass, so that measuring takes little
    memory. Raises MemoryError once more than `limit` bytes would be saved.
    """
    total, seen = 0, {p.untyped_storage()._cdata: (0, 0) for p in trainer.model.parameters()}
    references: list[StorageWeakRef] = []  # while there is one, no other storage gets the same address

    def count(x: torch.Tensor) -> None:
        nonlocal total
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes(), 4 * storage.nbytes() // x.itemsize
            references.append(StorageWeakRef(storage))
            total += storage.nbytes()
        if total > limit:
            raise MemoryError

    batch = {name: trainer.dist.to_device(x) for name, x in batch.items()}
    with (torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
          autocast(trainer.machine["dtype"], trainer.dist.device)):
        trainer.objective.loss(trainer.model, batch)
    return [sizes for sizes in seen.values() if sizes[0]]


def bytes_per_row(trainer: Trainer, limit: float = math.inf) -> int:
    """Return the bytes per row of a micro-batch in a training step, or more than `limit` as soon as that is certain.

    It compares forward passes of one row and of two: the difference is what a row saves, without what rows share (the
    weights in bf16). The backward pass adds the gradients of the activations. The largest are those of the logits, if
    the loss holds them all: besides the saved log p, the logits as computed and in float32, and both gradients. The
    heap fragments, too: processes took 1.4 times the memory in use, and twice with large logits. So on a CPU a row
    counts as 1.8 times what it saves, plus 6 times its largest tensor in float32. That was 1.0 to 1.9 times the growth
    of the process when all models held all logits (LOG.md). A compiled model needs less, down to a third, but
    compilation may fail. A GPU's allocator fragments little; its factors, 1.1 and 3, are estimates, not measured.

    Activations that are computed again are there for one block at a time; of the others, what enters them is saved.
    """
    if trainer.config.recompute != "on":
        return _measured(trainer, limit)
    with parallelize.last_block_keeps(trainer.model):
        return _measured(trainer, limit)


def _measured(trainer: Trainer, limit: float) -> int:
    """Compute `bytes_per_row` of what the forward pass keeps."""
    slack, transient = HEAP[trainer.dist.device.type]
    head_gradient = _head_gradient(trainer)  # counted by `fixed_bytes`, like the weights in bf16
    shared = head_gradient + _rounded(trainer)
    measured: list[Counter[tuple[int, int]]] = [Counter({(head_gradient, head_gradient): 1})]
    first = {name: x[:1] for name, x in (trainer.objective.widest or partial(trainer.objective.batch, 0))().items()}
    trainer.model.train()
    for rows in (1, 2):
        try:
            batch = {name: x.repeat_interleave(rows, 0) for name, x in first.items()}
            measured.append(Counter(saved_tensors(trainer, batch, limit + shared)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
    if len(measured) == 1:
        return int(limit) + 1
    per_row_tensors = measured[-1] - measured[-2]  # shared tensors have the same size in both
    before, after = (sum(size * number for (size, _), number in sizes.items()) for sizes in measured[-2:])
    widest = max((as_float32 for _, as_float32 in per_row_tensors), default=0) // (len(measured) - 1)
    return int(slack * (after - before) + transient * widest)


# ---------------------------------------------------------------- fitting a run into memory


def free_here(dist: Dist) -> int | None:
    """Return the bytes each rank can allocate on its device; ranks on one CPU share its memory."""
    free = free_bytes(dist.device)
    if free is None or dist.device.type != "cpu" or dist.world == 1:
        return free
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", dist.world))  # set by torchrun: ranks on this machine


def rows_that_fit(trainer: Trainer) -> tuple[int, int, int]:
    """Return (rows, needed, free): rows of a micro-batch that fit on every rank, the same on all.

    rows: those of `trainer.config` if they fit or free memory is unknown; 0 if not even one fits, or not even what the
    run keeps. needed: bytes that must be free for one row. free: bytes that this rank can allocate.
    """
    (rows, width), needed, free = _micro_batch(trainer), 0, free_here(trainer.dist)
    if free is not None and upper_bound(trainer) > SMALL_FREE * free:
        available, outside = free - fixed_bytes(trainer), _outside(trainer)
        if parallelize.is_sharded(trainer.model):  # measuring takes all ranks, and each may have other memory
            row = row_bound(trainer) if available >= outside else 0
        else:
            row = bytes_per_row(trainer, SHARE * available) if available >= outside else 0
        row_logits, max_logits = _logits(trainer, width)
        # limited by the logits of all rows, or by the largest chunk of logits
        budget = int(SHARE * available)
        rows = min(rows, max(budget // (row + row_logits), (budget - max_logits) // row)) if row else 0
        needed = fixed_bytes(trainer) + max(outside, int((row + row_logits) / SHARE))
    return trainer.dist.all_min(rows), needed, free or 0


def fit_micro_batches(trainer: Trainer) -> None:
    """Split the steps of a new run into micro-batches that fit into memory; the step itself stays the same.

    If --batch-size is too large, `trainer.config` gets a smaller one and more --grad-accum, with a warning. If an
    evaluation batch is too large, `trainer.record` gets `evaluation_rows`. Call it before the first step of a new run
    only: a resumed run must compute as it started.

    Raises BardletError if not even one row per rank fits, naming the needed and the free memory.
    """
    c, parts, length = trainer.config, trainer.dist.parts, min(256, trainer.config.block_size)
    requested, width = _micro_batch(trainer)
    rows, needed, free = rows_that_fit(trainer)
    if rows < 1 and c.recompute == "auto":
        trainer.config = c = replace(c, recompute="on")
        parallelize.recompute(trainer.model)
        rows, needed, free = rows_that_fit(trainer)
        if rows:
            log.warning("a row of %s tokens does not fit into %s of memory: computing activations again in the "
                        "backward pass, which takes a third more time", f"{width:,}", _size(free))
    if rows < 1:
        size = "--block-size" if c.init else "--block-size, --n-embd or --n-layer"
        setting = flag(c.batch_setting) if _windows(trainer) > free // 2 else size
        raise BardletError(f"training does not fit into memory: a single row of {width:,} tokens needs at least "
                           f"{_size(needed)}, but {_size(free)} are free; use a smaller {setting}")
    if rows < requested:
        trainer.config = c.with_micro_batches_of(rows, requested, parts)
        log.warning("%s of memory are free, too little for %s %d: splitting each step into %d micro-batches, with the "
                    "same result%s", _size(free), flag(c.batch_setting), getattr(c, c.batch_setting),
                    trainer.config.grad_accum, " except for the dropout masks" if c.dropout else "")
    available = SHARE * max(0, free - fixed_bytes(trainer)) / HEAP["cpu"][1] if free else metrics.MAX_BYTES
    evaluation_rows = trainer.dist.all_min(
        metrics.rows_at_once(trainer.model.config, length, min(int(available), metrics.MAX_BYTES)))
    if evaluation_rows < metrics.rows_at_once(trainer.model.config, length):
        trainer.record.evaluation_rows = evaluation_rows


def max_parameters(dist: Dist, shared: bool = False) -> float:
    """Return the maximum parameter count of a model to train here: training it may take half of the free memory.

    shared: the processes may share it.
    """
    free = free_here(dist)
    if free is None:
        return math.inf
    return dist.all_min(free // (2 * TRAINED)) * (dist.world if shared and not dist.slices else 1)


def check_weights(shape: ModelConfig, dist: Dist, shared: bool = False) -> None:
    """Raise BardletError if a model of this shape cannot be trained here at any batch size, without building it.

    shared: the processes may share it.
    """
    free = free_here(dist)
    try:
        with on_meta_device():
            needed = float(TRAINED) * sum(p.numel() for p in models.build(shape).parameters())
        needed /= dist.world if shared else 1
    except RuntimeError:  # the size overflows 64 bits
        needed = math.inf
    if free is not None and needed > free:
        raise BardletError(f"the model does not fit into memory: training it takes {_size(needed)}, "
                           f"but {_size(free)} are free; use a smaller --n-embd or --n-layer")


def _size(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size < math.inf else "more than any machine has"
