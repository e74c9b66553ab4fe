"""The factor of the loss in the backward pass of a training in fp16.

(Micikevicius et al. 2018, *Mixed Precision Training*.) Gradients below 6e-8 are zero in fp16, and above 65,504
infinite. So the loss is multiplied by a large factor before the backward pass, and the gradients are divided by it
afterwards. The factor is halved, and the update left out, when a gradient is infinite, and doubled after PATIENCE steps
in which none was. bf16 has the range of fp32 and needs none.
"""

from __future__ import annotations

import math

from bardlet.training.state import Trainer

PATIENCE = 2000
"""Updates in a row after which the factor is doubled (torch.amp.GradScaler's value)."""


def factor(trainer: Trainer) -> float:
    """Return the factor of the loss in the next step: 1 except in fp16."""
    return trainer.state.loss_scale if trainer.machine["dtype"] == "fp16" else 1.0


def adapted(trainer: Trainer, loss: float, norm: float) -> bool:
    """Adapt the factor after a step. Return True if the step was left out because the factor was too large.

    Args:
        loss, norm: as `train_step` returned them, the same on every rank.
    """
    state = trainer.state
    if trainer.machine["dtype"] != "fp16" or not math.isfinite(loss):
        return False
    if not math.isfinite(norm):
        state.loss_scale, state.scaled = state.loss_scale / 2, 0
        return state.loss_scale >= 1  # below, the gradient itself is infinite
    state.scaled += 1
    if state.scaled == PATIENCE:
        state.loss_scale, state.scaled = 2 * state.loss_scale, 0
    return False
