"""TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bardlet.config.settings import Settings
from bardlet.errors import BardletError


def trackers(config: Settings, run: Path) -> list[Callable[[int, dict[str, float]], None]]:
    """What TensorBoard and Weights & Biases are told of a step: functions of (step, values), for those asked for."""
    tell: list[Callable[[int, dict[str, float]], None]] = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BardletError("--tensorboard: not installed; `pip install 'bardlet[tensorboard]'`") from None
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        tell.append(to_tensorboard)
    if config.wandb:
        try:
            import wandb
        except ImportError:
            raise BardletError("--wandb: not installed; `pip install 'bardlet[wandb]'`") from None
        wandb.init(project=config.wandb, name=run.name, dir=str(run))
        tell.append(lambda step, values: wandb.log(values, step=step))
    return tell
