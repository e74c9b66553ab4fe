"""Cross-entropy: of a head and its loss in one, whose logits are never all there; and of each target by itself.

Shape suffixes: N targets, R some of them, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that no loss is taken on (PyTorch's own number for it)."""

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27, "mps": 2**24}
"""How many logits `linear_cross_entropy` has at once: on a CPU they fit into its cache. (GPUs: not measured yet.)"""

CHUNK_ROWS = 512
"""States that it takes at least at once: after each such piece the gradient of the whole head is added to."""


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """How many states `linear_cross_entropy` makes logits of at once."""
    return max(CHUNK_ROWS, CHUNK_LOGITS[device.type] // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` of targets none of which is IGNORE; the gradients are made along with the loss."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, target_N: Tensor, smoothing: float,
                dtype: torch.dtype) -> Tensor:  # fmt: skip
        x, weight = x_NC.to(dtype), weight_VC.to(dtype)
        for_x, for_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if for_x else None
        grad_weight = torch.zeros_like(weight_VC) if for_weight else None
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        rows = rows_per_chunk(len(weight), x.device)
        for some in (slice(start, start + rows) for start in range(0, len(x), rows)):
            loss, grad_RV = _chunk(x[some] @ weight.T, target_N[some, None], smoothing, for_x or for_weight)
            total += loss
            if grad_x is not None:
                torch.mm(grad_RV, weight, out=grad_x[some])
            if grad_weight is not None:
                grad_weight += grad_RV.T @ x[some]
            del grad_RV  # before the next logits come
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = x_NC.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (None if grad_x is None else grad_x.to(ctx.dtype) * grad,
                None if grad_weight is None else grad_weight * grad, None, None, None)  # fmt: skip


def _chunk(logits_RV: Tensor, target_R1: Tensor, smoothing: float, learns: bool) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy, its gradient by the logits in their dtype); the logits may be overwritten.

    learns: whether the second is asked for; it means nothing else.
    """
    # in float32 at least: bfloat16 has 8 bits of mantissa, too few to add up a softmax over a vocabulary
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    most_R1, wanted_R1 = wide_RV.amax(1, keepdim=True), wide_RV.gather(1, target_R1)
    if smoothing:
        wanted_R1 += smoothing * (wide_RV.mean(1, keepdim=True) - wanted_R1)
    p_RV = wide_RV.sub_(most_R1).exp_()
    sum_R1 = p_RV.sum(1, keepdim=True)
    loss = (sum_R1.log() + most_R1 - wanted_R1).sum()
    if not learns:
        return loss, p_RV
    p_RV /= sum_R1
    p_RV.scatter_add_(1, target_R1, torch.full_like(sum_R1, smoothing - 1))  # p, less what it should be
    if smoothing:
        p_RV -= smoothing / p_RV.shape[1]
    return loss, p_RV.to(logits_RV.dtype)


def linear_cross_entropy(x: Tensor, weight_VC: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of a linear head, summed, without all of its logits ever being there at once.

    F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum", label_smoothing=smoothing), with products in
    autocast's dtype. Of a vocabulary of thousands the logits, log p and their gradients are most of what a step keeps,
    and of what it reads and writes. (Hsu et al. 2024, *Liger Kernel*, and Wijmans et al. 2024, *Cut Your Losses in
    Large-Vocabulary Language Models*, do so in kernels of their own, on GPUs.)

    Args:
        x: states (..., C). weight_VC: the head. target: (...) int64, IGNORE where nothing is to be computed.
        smoothing: the part of each target that is spread evenly over the vocabulary.

    Returns:
        A scalar in nats, float32, that can be differentiated once.
    """
    x_NC, target_N, kind = x.flatten(0, -2), target.flatten(), x.device.type
    where_N = target_N != IGNORE
    if not where_N.all():
        x_NC, target_N = x_NC[where_N], target_N[where_N]
    if not torch.is_grad_enabled():  # a Function is not told, and would make gradients for an evaluation, too
        x_NC, weight_VC = x_NC.detach(), weight_VC.detach()
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    total: Tensor = _LinearCrossEntropy.apply(x_NC, weight_VC, target_N, smoothing, dtype)
    return total


def token_losses(logits_NV: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """-log p of each target that is not IGNORE, 0 elsewhere: float32 in nats, in the shape of `target`.

    Args:
        logits_NV: at these targets alone, one after the other. target: int64. temperature: divides the logits.
    """
    where = target != IGNORE
    loss_N = F.cross_entropy(logits_NV.float() / temperature, target[where], reduction="none")
    return loss_N.new_zeros(target.shape).masked_scatter(where, loss_N)
