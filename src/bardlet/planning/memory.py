"""How much memory a run may take, and micro-batches that fit into it: no run ends for want of memory.

What a training step needs grows by the same amount with every row (window) of a micro-batch. That amount is measured
before the first step. Where --batch-size rows are too many, the step is made of more and smaller micro-batches: the
same windows, the same sum of losses, the same step.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from bardlet import models
from bardlet.config.model import ModelConfig
from bardlet.config.settings import flag
from bardlet.data.batch import Batch
from bardlet.errors import BardletError, is_out_of_memory
from bardlet.evaluation import metrics
from bardlet.models.layers import on_meta_device
from bardlet.ops.cross_entropy import rows_per_chunk
from bardlet.runtime.device import autocast
from bardlet.runtime.distributed import Dist
from bardlet.training import optim
from bardlet.training.state import Trainer

log = logging.getLogger("bardlet")

SHARE = 0.6
"""The part of the memory that is free, after what a run keeps, which its micro-batches may take: others live here, too,
and the compiler wants some hundred megabytes."""

LATER = 100_000_000
"""Bytes kept for the libraries that a run imports later on, of which matplotlib is the largest."""

UPDATE = 24
"""Bytes that each parameter takes between micro-batches: Muon's copies (in fp32; 20 in bf16), the result as it is read
at the end."""

TRAINED = 16
"""Bytes that each parameter takes in training: itself, its gradient, and AdamW's two averages."""

LOGIT = 16
"""Bytes of each of the logits that `linear_cross_entropy` has at once: as computed, in float32, their gradient, and as
much again for the holes in the heap."""

SMALL_FREE = 0.2
"""A run that cannot take more than this part of what is free is not measured."""

HEAP = {"cpu": (1.8, 6.0), "cuda": (1.1, 3.0)}
"""What a row needs: so many times what is saved for its backward pass, and its largest saved tensor in float32."""

# ---------------------------------------------------------------- what there is


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """The bytes that this process may still take on `device`; None where nobody knows, as on Apple's GPUs.

    On a CPU the smallest of: what Linux calls available, what is left to each control group (a container) of this
    process, in version 1 or 2, where cached files count as free, and what is left of its address space (ulimit -v). A
    system that tells none of these is taken to have half of its memory free. On a GPU what the driver says, and what
    PyTorch holds without using it.

    Args:
        root: where /proc and /sys lie.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = _left_to_groups(root)
    with suppress(OSError, KeyError):
        found.append(1024 * _table(root / "proc/meminfo")["MemAvailable:"])
    with suppress(ImportError, OSError):
        import resource  # not on Windows

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            taken = int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(most - taken)
    if not found:
        with suppress(AttributeError, OSError, ValueError):  # macOS; Windows has no sysconf
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(found)) if found else None


def _left_to_groups(root: Path) -> list[int]:
    """The bytes left in each control group that this process is in and that has a limit."""
    found: list[int] = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            old = "memory" in controllers.split(",")  # version 1 has a tree for each controller, 2 one for all
            if controllers and not old:
                continue
            base = root / ("sys/fs/cgroup/memory" if old else "sys/fs/cgroup")
            most, taken = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
            for place in (PurePosixPath(path), *PurePosixPath(path).parents):  # a group is bound by those around it
                folder = base / str(place).lstrip("/")
                with suppress(OSError, ValueError, KeyError):  # no such file, or "max": no limit here
                    limit = int((folder / f"memory.{most}").read_text())
                    facts = _table(folder / "memory.stat")
                    cached = sum(facts[f"{'total_' * old}{kind}_file"] for kind in ("active", "inactive"))
                    found.append(limit - int((folder / f"memory.{taken}").read_text()) + cached)
    return found


def _table(path: Path) -> dict[str, int]:
    """The lines `NAME NUMBER ...` of a file of the kernel's."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}


# ---------------------------------------------------------------- what is needed


def fixed(trainer: Trainer) -> int:
    """Bytes that a run comes to keep besides its weights, whatever the micro-batch.

    Gradients, the optimizers' state, a copy of the weights (while steps are timed, later their average), the buckets in
    which gradients travel between processes, the weights in bf16, the gradient of the head while it is summed, and on
    a CPU the windows of a step and LATER.
    """
    state = sum(p.numel() * len(optim.STATE[type(optimizer)] - {"step"})
                for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"])
    copies = 2 + (trainer.dist.world > 1) + 0.5 * (trainer.machine["dtype"] == "bf16")
    here = _windows(trainer) + LATER if trainer.dist.device.type == "cpu" else 0
    return int(4 * (copies * _parameters(trainer) + state)) + 2 * _head_gradient(trainer) + here


def _head(trainer: Trainer) -> torch.Tensor | None:
    """The head whose logits `linear_cross_entropy` makes some at a time; None where a loss has them all: that of a rung
    of the ladder, and those of the stages that learn from preferences and rewards."""
    head: torch.Tensor | None = None if trainer.objective.all_logits else getattr(trainer.model, "head", None)
    return head


def _head_gradient(trainer: Trainer) -> int:
    """Bytes of the gradient that `linear_cross_entropy` saves of a head; it has it twice."""
    head = _head(trainer)
    return 4 * head.numel() if head is not None and head.requires_grad else 0


def _logits(trainer: Trainer, width: int) -> tuple[int, int]:
    """(of a row of `width` tokens, at most): bytes of the logits that `linear_cross_entropy` has at once."""
    if (head := _head(trainer)) is None:
        return 0, 0
    each = LOGIT * len(head)
    most = each * rows_per_chunk(len(head), trainer.dist.device)
    return min(each * width, most), most


def _parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.model.parameters())


def _windows(trainer: Trainer) -> int:
    """Bytes of the global batch while it is cut out of the text: tokens, targets, places and copies of them."""
    return 40 * trainer.config.tokens_per_step


def _micro_batch(trainer: Trainer) -> tuple[int, int]:
    """(rows, width): the largest micro-batch of a process, in rows and in tokens of a row."""
    if trainer.objective.widest is None:
        width = trainer.config.block_size
        return trainer.config.tokens_per_step // trainer.config.grad_accum // width // trainer.dist.world, width
    rows, *widths = trainer.objective.widest()["target"].shape  # of preferences two answers, side by side
    return rows // (trainer.config.grad_accum * trainer.dist.world), math.prod(widths)


def upper_bound(trainer: Trainer) -> int:
    """Bytes that a run takes at most besides its weights: a formula with room to spare, which costs nothing.

    `fixed`, UPDATE for each parameter, and for each token of a micro-batch
    4 (L (30 C + 16 I + 10 H T) + 60 C + 20 V): L layers, C channels, I inner ones, H heads, T positions, V vocabulary,
    whose logits may all be there at once.
    """
    m, (rows, T) = trainer.model.config, _micro_batch(trainer)
    blocks = 2 * m.n_layer + m.n_encoder_layer if m.n_encoder_layer else m.n_layer  # with cross-attention nearly two
    layers = blocks * (30 * m.n_embd + 16 * m.n_inner + 10 * m.n_head * T)
    token = 4 * (layers + 60 * m.n_embd + 20 * m.vocab_size)
    return fixed(trainer) + UPDATE * _parameters(trainer) + rows * T * token


def saved(trainer: Trainer, batch: Batch, limit: float = math.inf) -> list[tuple[int, int]]:
    """What a forward pass of `batch` keeps for the backward pass: (bytes, bytes as float32) of each tensor.

    Each piece of memory counts once, parameters not at all. MemoryError as soon as more than `limit` bytes are kept.
    """
    total, seen = 0, {p.untyped_storage().data_ptr(): (0, 0) for p in trainer.model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes(), 4 * storage.nbytes() // x.itemsize
            total += storage.nbytes()
        if total > limit:
            raise MemoryError
        return x

    here = {name: trainer.dist.to_device(x) for name, x in batch.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(trainer.machine["dtype"], trainer.dist.device):
        trainer.objective.loss(trainer.model, here)
    return [sizes for sizes in seen.values() if sizes[0]]


def per_row(trainer: Trainer, limit: float = math.inf) -> int:
    """Bytes that each row of a micro-batch takes in a training step; more than `limit` as soon as that is known.

    One forward pass of one row and one of two: the difference is what a row saves, without what rows share (the weights
    in bf16). The backward pass adds the gradients of the activations, of which the largest are those of the logits, in
    a loss that has them all: beside log p, which is saved, the logits as computed and in float32, and their gradient in
    both. And a heap that keeps what is freed has holes: processes took 1.4 times what was in use, with large logits
    twice. So on a CPU a row counts 1.8 times what it saves, and 6 times its largest tensor in float32. That was 1.0 to
    1.9 times the growth of the process when all models had all logits (LOG.md). Compiled it grows by less, down to a
    third, but compiling may fail. Of a GPU's allocator, which has few holes, 1.1 and 3 times are expected, unmeasured.
    """
    slack, transient = HEAP[trainer.dist.device.type]
    once = _head_gradient(trainer)  # `fixed` has counted it, and the weights in bf16
    shared = once + (2 * _parameters(trainer) if trainer.machine["dtype"] == "bf16" else 0)
    found: list[Counter[tuple[int, int]]] = [Counter({(once, once): 1})]
    first = {name: x[:1] for name, x in (trainer.objective.widest or partial(trainer.objective.batch, 0))().items()}
    trainer.model.train()
    for rows in (1, 2):
        try:
            batch = {name: x.repeat_interleave(rows, 0) for name, x in first.items()}
            found.append(Counter(saved(trainer, batch, limit + shared)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
    if len(found) == 1:
        return int(limit) + 1
    own = found[-1] - found[-2]  # tensors without rows are in both, of one size
    before, after = (sum(size * number for (size, _), number in one.items()) for one in found[-2:])
    widest = max((wide for _, wide in own), default=0) // (len(found) - 1)
    return int(slack * (after - before) + transient * widest)


# ---------------------------------------------------------------- what is done about it


def free_here(dist: Dist) -> int | None:
    """The bytes that each process of a run may take on its device: those on one CPU share what is there."""
    free = free_bytes(dist.device)
    if free is None or dist.device.type != "cpu" or dist.world == 1:
        return free
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", dist.world))  # torchrun says how many share this machine


def rows_that_fit(trainer: Trainer) -> tuple[int, int, int]:
    """(rows, needed, free): how many rows of a micro-batch each process can have at once, the same in all of them.

    As many as `t.config` asks for where they fit or nobody knows; 0 where not even one does, or what the run keeps is
    too much already. needed: the bytes that have to be free for one row; free: those that this process may take.
    """
    (rows, width), needed, free = _micro_batch(trainer), 0, free_here(trainer.dist)
    if free is not None and upper_bound(trainer) > SMALL_FREE * free:
        room, update = free - fixed(trainer), UPDATE * _parameters(trainer)
        row = per_row(trainer, SHARE * room) if room >= update else 0
        each, most = _logits(trainer, width)
        # as many as fit with all of their logits, or with the most logits that there are at once
        rows = min(rows, max(int(SHARE * room) // (row + each), (int(SHARE * room) - most) // row)) if row else 0
        needed = fixed(trainer) + max(update, int((row + each) / SHARE))
    return trainer.dist.all_min(rows), needed, free or 0


def fit_micro_batches(trainer: Trainer) -> None:
    """Make the micro-batches of a new run so small that a step fits into memory; the step stays the same.

    Where --batch-size is too much, `t.config` gets a smaller one and so much more --grad-accum, and a notice says so.
    Where the batches of an evaluation are too much, `t.record` gets `evaluation_rows`. To be called before the first
    step of a new run: one that goes on has to compute as it began.

    Raises BardletError where not even one row for each process fits, with what is needed and what is free.
    """
    c, world, length = trainer.config, trainer.dist.world, min(256, trainer.config.block_size)
    asked, width = _micro_batch(trainer)
    rows, needed, free = rows_that_fit(trainer)
    if rows < 1:
        what = flag(c.batch_setting) if _windows(trainer) > free // 2 else "--block-size, --n-embd or --n-layer"
        raise BardletError(f"training does not fit into memory: by single rows of {width:,} tokens it wants "
                           f"{_size(needed)} or more, {_size(free)} are free; take a smaller {what}")
    if rows < asked:
        trainer.config = c.with_micro_batches_of(rows, asked, world)
        log.warning("%s of memory are free, too little for %s %d: a step is computed in %d micro-batches, with the "
                    "same result%s", _size(free), flag(c.batch_setting), getattr(c, c.batch_setting),
                    trainer.config.grad_accum, " but for where dropout falls" if c.dropout else "")
    room = SHARE * max(0, free - fixed(trainer)) / HEAP["cpu"][1] if free else metrics.LARGE
    looks = trainer.dist.all_min(metrics.rows_at_once(trainer.model.config, length, min(int(room), metrics.LARGE)))
    if looks < metrics.rows_at_once(trainer.model.config, length):
        trainer.record.evaluation_rows = looks


def most_parameters(dist: Dist) -> float:
    """How many parameters a model may have that is to be trained here: they take half of what is free."""
    free = free_here(dist)
    return math.inf if free is None else dist.all_min(free // (2 * TRAINED))


def check_weights(shape: ModelConfig, dist: Dist) -> None:
    """Raise BardletError where a model of this shape cannot be trained here, whatever the batch: before it is made."""
    free = free_here(dist)
    try:
        with on_meta_device():
            needed = float(TRAINED) * sum(p.numel() for p in models.build(shape).parameters())
    except RuntimeError:  # more than 64 bits can count
        needed = math.inf
    if free is not None and needed > free:
        raise BardletError(f"the model does not fit into memory: training it takes {_size(needed)}, "
                           f"{_size(free)} are free; take a smaller --n-embd or --n-layer")


def _size(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size < math.inf else "more than any machine has"
