"""Compare one training step on a device with the same step on the CPU: a driver or kernel may be wrong in silence."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.data.batch import Batch
from bardlet.runtime.distributed import Dist
from bardlet.training import losses
from bardlet.training.state import Objective
from bardlet.training.step import InRun, train_step

FAMILIES: tuple[Literal["qwen3", "gpt2"], ...] = ("qwen3", "gpt2")
LOSS_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-2
"""Relative differences above which a step counts as wrong. The order of float32 sums makes 1e-6, TF32 about 1e-3."""
VOCABULARY, ROWS = 256, 4


@dataclass(frozen=True)
class Difference:
    """The relative differences of a step from the CPU's: of the loss, and of the worst parameter's gradient."""

    model: str
    loss: float
    gradient: float
    parameter: str
    """The name of that parameter."""

    @property
    def ok(self) -> bool:
        """True if both are below their limits; NaN is not."""
        return self.loss <= LOSS_LIMIT and self.gradient <= GRADIENT_LIMIT


def compare_with_cpu(device: torch.device) -> list[Difference]:
    """Return the differences of a float32 step of each model family, two layers of 64 channels.

    Raises:
        RuntimeError: PyTorch cannot compute the step on this device (NotImplementedError is one).
    """
    differences = []
    for family in FAMILIES:
        config = TrainConfig(model=family, n_layer=2, n_head=4, n_embd=64, block_size=64, optimizer="adamw",
                             grad_clip=0.0).resolved()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = models.build(config.model_config(VOCABULARY))
            idx = torch.randint(VOCABULARY, (ROWS, config.block_size + 1))
        batch = {"idx": idx[:, :-1].contiguous(), "target": idx[:, 1:].contiguous()}
        batch["target"][0, config.block_size // 2 :] = losses.IGNORE
        reference = _step(deepcopy(model), batch, config, torch.device("cpu"))
        differences.append(_difference(family, reference, _step(model, batch, config, device)))
    return differences


def _step(model: Any, batch: Batch, config: TrainConfig, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Return (loss, gradients on the CPU in float64) of one training step on a device."""
    model.to(device).train()
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> None:
        gradients.update({name: p.grad.detach().cpu().double() for name, p in model.named_parameters()})

    objective = Objective(lambda step: batch, losses.next_token_loss, losses.count_targets, lambda model: 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, _ = train_step(model, [optimizer], batch, objective, config, Dist(0, 1, device), "fp32", InRun(keep))
    return loss, gradients


def _difference(family: str, expected: tuple[float, dict[str, torch.Tensor]],
                actual: tuple[float, dict[str, torch.Tensor]]) -> Difference:
    """Return the relative differences of two steps."""
    (loss, gradients), (other_loss, others) = expected, actual
    if not others:  # `train_step` updates nothing if the loss or the gradient is not finite
        return Difference(family, abs(other_loss - loss) / loss, float("nan"), "every parameter")
    relative = {name: float((others[name] - grad).norm() / grad.norm()) for name, grad in gradients.items()}
    worst = max(relative, key=lambda name: relative[name])
    return Difference(family, abs(other_loss - loss) / loss, relative[worst], worst)
