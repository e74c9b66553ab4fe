"""Fused linear + cross-entropy, which never materializes the full logits, and per-token losses.

Shape suffixes: N targets, R targets of a chunk, C channels, V vocabulary.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target without a loss (PyTorch's value for it)."""

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27, "mps": 2**24}
"""Logits per chunk of `linear_cross_entropy`: on a CPU they fit into its cache. (GPUs: not measured yet.)"""

CHUNK_ROWS, CHUNK_ROWS_FROZEN = 512, 192
"""Minimum rows per chunk, since each chunk adds to the gradient of the whole head; and for a head without a gradient,
which more rows do not make faster."""

_kept = threading.local()
"""The memory of `_scratch` for each thread, by dtype."""


def rows_per_chunk(vocab_size: int, device: torch.device, trained: bool = True) -> int:
    """Return the number of rows per chunk of `linear_cross_entropy`. trained: the head gets a gradient."""
    return max(CHUNK_ROWS if trained else CHUNK_ROWS_FROZEN, CHUNK_LOGITS[device.type] // vocab_size)


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix with any content. On a CPU, the same memory serves every call of a thread.

    The number of targets changes from step to step, and the C library's heap falls into pieces of such sizes.
    """
    if device.type != "cpu":
        return torch.empty((rows, columns), dtype=dtype, device=device)
    if not hasattr(_kept, "memory"):
        _kept.memory = {}
    memory: dict[torch.dtype, Tensor] = _kept.memory
    if dtype not in memory or memory[dtype].numel() < rows * columns:
        with torch.inference_mode(False):  # a tensor made in that mode could not be used outside
            memory[dtype] = torch.empty(rows * columns, dtype=dtype)
    return memory[dtype][: rows * columns].view(rows, columns)


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` for targets without IGNORE; the forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, target_N: Tensor, smoothing: float,
                dtype: torch.dtype) -> Tensor:  # fmt: skip
        x, weight = x_NC.to(dtype), weight_VC.to(dtype)
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if x_needs_grad else None
        grad_weight = torch.zeros_like(weight_VC) if weight_needs_grad else None
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        rows = rows_per_chunk(len(weight), x.device, weight_needs_grad)
        shape = min(rows, len(x)), len(weight)
        logits_RV = _scratch(*shape, dtype, x.device)
        float_RV = logits_RV if total.dtype == dtype else _scratch(*shape, total.dtype, x.device)
        for start in range(0, len(x), rows):
            x_RC, target_R1 = x[start : start + rows], target_N[start : start + rows, None]
            grad_RV = torch.mm(x_RC, weight.T, out=logits_RV[: len(x_RC)])
            # at least float32: bfloat16's 8-bit mantissa is too coarse to sum a softmax over the vocabulary
            p_RV = grad_RV if float_RV is logits_RV else float_RV[: len(x_RC)].copy_(grad_RV)
            total += _chunk_loss(p_RV, target_R1, smoothing, x_needs_grad or weight_needs_grad)
            if p_RV is not grad_RV:
                grad_RV.copy_(p_RV)
            if grad_x is not None:
                torch.mm(grad_RV, weight, out=grad_x[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad_RV.T @ x_RC
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = x_NC.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (None if grad_x is None else grad_x.to(ctx.dtype) * grad,
                None if grad_weight is None else grad_weight * grad, None, None, None)  # fmt: skip


def _chunk_loss(logits_RV: Tensor, target_R1: Tensor, smoothing: float, needs_grad: bool) -> Tensor:
    """Return the summed cross-entropy, and put its gradient with respect to the logits in their place.

    Without needs_grad, something else is there.
    """
    max_R1, label_R1 = logits_RV.amax(1, keepdim=True), logits_RV.gather(1, target_R1)
    if smoothing:
        label_R1 += smoothing * (logits_RV.mean(1, keepdim=True) - label_R1)
    p_RV = logits_RV.sub_(max_R1).exp_()
    sum_R1 = p_RV.sum(1, keepdim=True)
    loss = (sum_R1.log() + max_R1 - label_R1).sum()
    if needs_grad:
        p_RV /= sum_R1
        p_RV.scatter_add_(1, target_R1, torch.full_like(sum_R1, smoothing - 1))  # p minus the target distribution
        if smoothing:
            p_RV -= smoothing / p_RV.shape[1]
    return loss


def linear_cross_entropy(x: Tensor, weight_VC: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the summed cross-entropy of a linear head without materializing the full logits.

    F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum", label_smoothing=smoothing), with products in
    autocast's dtype. With a vocabulary of thousands, the logits, log p and their gradients are most of the memory and
    of the memory traffic of a step. (Hsu et al. 2024, *Liger Kernel*, and Wijmans et al. 2024, *Cut Your Losses in
    Large-Vocabulary Language Models*, do this in custom GPU kernels.)

    Args:
        x: hidden states (..., C). weight_VC: the head. target: (...) int64, IGNORE where no loss is computed.
        smoothing: the share of each target that is spread evenly over the vocabulary.

    Returns:
        A scalar in nats, float32, differentiable once.
    """
    x_NC, target_N, kind = x.flatten(0, -2), target.flatten(), x.device.type
    valid_N = target_N != IGNORE
    if not valid_N.all():
        x_NC, target_N = x_NC[valid_N], target_N[valid_N]
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad: an evaluation would compute gradients, too
        x_NC, weight_VC = x_NC.detach(), weight_VC.detach()
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    total: Tensor = _LinearCrossEntropy.apply(x_NC, weight_VC, target_N, smoothing, dtype)
    return total


def token_losses(logits_NV: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -log p of each target that is not IGNORE, 0 elsewhere: float32 in nats, in the shape of `target`.

    Args:
        logits_NV: the logits at these targets only, in order. target: int64. temperature: divides the logits.
    """
    valid = target != IGNORE
    loss_N = F.cross_entropy(logits_NV.float() / temperature, target[valid], reduction="none")
    return loss_N.new_zeros(target.shape).masked_scatter(valid, loss_N)
