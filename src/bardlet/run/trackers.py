"""TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bardlet.config.settings import Settings
from bardlet.errors import BardletError


def trackers(config: Settings, run: Path) -> list[Callable[[int, dict[str, float]], None]]:
    """Return a function of (step, values) for each tracker that the settings enable."""
    loggers: list[Callable[[int, dict[str, float]], None]] = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BardletError("--tensorboard: not installed; run `pip install tensorboard`") from None
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        loggers.append(to_tensorboard)
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise BardletError("--wandb: not installed; run `pip install wandb`") from None
        wandb.init(project=config.wandb, name=run.name, dir=str(run))
        loggers.append(lambda step, values: wandb.log(values, step=step))
    return loggers
