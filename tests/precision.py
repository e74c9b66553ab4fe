"""What bf16 blocks change, with or without a deliberate fault, for the tests of the models."""

from __future__ import annotations

from typing import Any

import torch


def bf16_errors(model: Any, blocks: Any, projection: torch.nn.Linear, compiled: bool,
                fault: str) -> tuple[float, float]:
    """Return (mean change of a token's loss in nats, relative change of the gradient) by bf16 autocast.

    Args:
        model: float32, in training mode.
        blocks: its blocks, compiled for the bf16 step if `compiled`.
        projection: the layer that gets the `fault`; "none" is none.
    """
    idx = torch.randint(model.config.vocab_size, (8, 33), generator=torch.Generator().manual_seed(1))

    def losses_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        token_losses = model(idx[:, :-1], idx[:, 1:], reduction="none")
        token_losses.mean().backward()
        return token_losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, expected_gradient = losses_and_gradient()
    with torch.no_grad():
        projection.weight[3] *= {"a channel scaled by 1.5": 1.5, "a channel of zeros": 0.0}.get(fault, 1.0)
        if fault == "no bias":
            projection.bias.zero_()
    for block in blocks if compiled else ():
        block.compile(backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, gradient = losses_and_gradient()
    assert got.dtype == torch.float32
    return float((got - expected).abs().mean()), float((gradient - expected_gradient).norm() / expected_gradient.norm())
