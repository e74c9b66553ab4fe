"""Fused linear + cross-entropy, which never materializes the full logits, and per-token losses.

Shape suffixes: N targets, R targets of a chunk, C channels, V vocabulary, W its padded width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
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

WIDTHS = {"cpu": 1, "cuda": 128, "mps": 1}
"""The width of the logits of a head in training is a multiple of this: a GPU multiplies slowly by a matrix with an odd
number of rows. GPT-2's 50,257 tokens become 50,304, with zeros, only while they are multiplied: the weights and the
checkpoint keep their size. (Karpathy's nanoGPT pads the weights themselves.)"""

_kept = threading.local()
"""The memory of `_scratch` for each thread, by dtype."""


def rows_per_chunk(vocab_size: int, device: torch.device, trained: bool = True) -> int:
    """Return the number of rows per chunk of `linear_cross_entropy`. trained: the head gets a gradient."""
    return max(CHUNK_ROWS if trained else CHUNK_ROWS_FROZEN, CHUNK_LOGITS[device.type] // vocab_size)


def padded(weight_VC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a head in `dtype` with rows of zeros below it, so that there are a multiple of WIDTHS: (W, C), W >= V."""
    extra = -len(weight_VC) % WIDTHS[weight_VC.device.type]
    return F.pad(weight_VC.to(dtype), (0, 0, 0, extra)) if extra else weight_VC.to(dtype)


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
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, target_N: Tensor, smoothing: float, dtype: torch.dtype,
                compiled: bool) -> Tensor:  # fmt: skip
        x, weight, V = x_NC.to(dtype), padded(weight_VC, dtype), len(weight_VC)
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if x_needs_grad else None
        grad_weight = torch.zeros_like(weight_VC) if weight_needs_grad else None
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        rows = rows_per_chunk(V, x.device, weight_needs_grad)
        shape = min(rows, len(x)), len(weight)
        logits_RW = _scratch(*shape, dtype, x.device)
        in_place = compiled or total.dtype == dtype
        float_RW = logits_RW if in_place else _scratch(*shape, total.dtype, x.device)
        chunk_loss = _compiled(_fused_chunk_loss) if compiled else _chunk_loss
        for start in range(0, len(x), rows):
            x_RC, target_R1 = x[start : start + rows], target_N[start : start + rows, None]
            grad_RW = torch.mm(x_RC, weight.T, out=logits_RW[: len(x_RC)])  # 0 beyond V, as the gradient there is
            grad_RV, p_RV = grad_RW[:, :V], float_RW[: len(x_RC), :V]
            # at least float32: bfloat16's 8-bit mantissa is too coarse to sum a softmax over the vocabulary
            if not in_place:
                p_RV.copy_(grad_RV)
            total += chunk_loss(p_RV, target_R1, smoothing, x_needs_grad or weight_needs_grad)
            if not in_place:
                grad_RV.copy_(p_RV)
            if grad_x is not None:
                torch.mm(grad_RW, weight, out=grad_x[start : start + rows])
            if grad_weight is not None:
                grad_weight += (grad_RW.T @ x_RC)[:V]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = x_NC.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (None if grad_x is None else grad_x.to(ctx.dtype) * grad,
                None if grad_weight is None else grad_weight * grad, None, None, None, None)  # fmt: skip


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


def _fused_chunk_loss(logits_RV: Tensor, target_R1: Tensor, smoothing: float, needs_grad: bool) -> Tensor:
    """Compute `_chunk_loss` for logits of any dtype, in operations that a compiler fuses into few passes over them.

    One operation after the other, logits go about 25 times through a GPU's memory. GPT-2's for 32,768 tokens are 3.3 GB
    in bf16.
    """
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    log_sum_R1, label_R1 = wide_RV.logsumexp(1, keepdim=True), wide_RV.gather(1, target_R1)
    if smoothing:
        label_R1 = label_R1 + smoothing * (wide_RV.mean(1, keepdim=True) - label_R1)
    loss = (log_sum_R1 - label_R1).sum()
    if needs_grad:
        V = logits_RV.shape[1]
        label_RV = torch.arange(V, device=target_R1.device) == target_R1
        p_RV = (wide_RV - log_sum_R1).exp() - smoothing / V
        logits_RV.copy_(torch.where(label_RV, p_RV + (smoothing - 1), p_RV))
    return loss


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def linear_cross_entropy(x: Tensor, weight_VC: Tensor, target: Tensor, smoothing: float = 0.0,
                         compiled: bool = False) -> Tensor:
    """Return the summed cross-entropy of a linear head without materializing the full logits.

    F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum", label_smoothing=smoothing), with products in
    autocast's dtype. With a vocabulary of thousands, the logits, log p and their gradients are most of the memory and
    of the memory traffic of a step. (Hsu et al. 2024, *Liger Kernel*, and Wijmans et al. 2024, *Cut Your Losses in
    Large-Vocabulary Language Models*, do this in custom GPU kernels.)

    Args:
        x: hidden states (..., C). weight_VC: the head. target: (...) int64, IGNORE where no loss is computed.
        smoothing: the share of each target that is spread evenly over the vocabulary.
        compiled: have torch.compile fuse the operations on a chunk of logits.

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
    total: Tensor = _LinearCrossEntropy.apply(x_NC, weight_VC, target_N, smoothing, dtype, compiled)
    return total


def token_losses(logits_NV: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -log p of each target that is not IGNORE, 0 elsewhere: float32 in nats, in the shape of `target`.

    Args:
        logits_NV: the logits at these targets only, in order. target: int64. temperature: divides the logits.
    """
    valid = target != IGNORE
    loss_N = F.cross_entropy(logits_NV.float() / temperature, target[valid], reduction="none")
    return loss_N.new_zeros(target.shape).masked_scatter(valid, loss_N)
