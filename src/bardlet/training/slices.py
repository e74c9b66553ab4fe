"""The same sum of gradients on any number of processes.

Floating-point sums depend on their order. So a step is cut into a fixed number of slices (--elastic), whatever the
number of processes, and their gradients are the leaves of a binary tree: a process adds up a subtree of neighbors, and
`Dist.add_in_pairs` adds the subtrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from bardlet.runtime.distributed import Dist


class TreeSum:
    """The sum of vectors that come one after the other, as the leaves of a binary tree.

    Sums of complete subtrees are added as soon as there are two of the same size: of N vectors, at most 1 + log2(N) are
    kept.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, torch.Tensor]] = []

    def add(self, vector: torch.Tensor) -> None:
        """Add the next vector, which the sum keeps."""
        size = 1
        while self._sums and self._sums[-1][0] == size:
            vector = self._sums.pop()[1].add_(vector)
            size *= 2
        self._sums.append((size, vector))

    def root(self) -> torch.Tensor:
        """Return the sum; of a number of vectors that is no power of two, that of its complete subtrees."""
        while len(self._sums) > 1:
            (_, last), (size, before) = self._sums.pop(), self._sums.pop()
            self._sums.append((size, before.add_(last)))
        return self._sums[0][1]


def add_gradients(model: nn.Module, backward: Callable[[int], torch.Tensor], dist: Dist) -> torch.Tensor:
    """Compute the gradients of all slices and leave their sum in the parameters, on every rank.

    backward: computes the gradients of a slice and returns its loss (a scalar).

    Returns:
        The sum of the losses, a scalar.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    tree = TreeSum()
    for part in dist.own_parts:
        loss = backward(part)
        tree.add(flat([loss, *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)]))
        for p in parameters:
            p.grad = None
    total = dist.add_in_pairs(tree.root())
    loss, *grads = total.split([1, *(p.numel() for p in parameters)])
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.view_as(p)
    return loss[0]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the numbers of all tensors in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
