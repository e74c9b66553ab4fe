"""Read a model for the server: that of a run in progress with the weights of its newest checkpoint. Imports torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch

from bardlet.api.models import DType, Model, load
from bardlet.errors import BardletError
from bardlet.inference.decoders import native
from bardlet.inference.engine import Engine, EngineModel
from bardlet.run import checkpoint, hf, lock

log = logging.getLogger("bardlet")


def leave_the_cores() -> None:
    """Use one core in this thread, once there is an engine.

    With a second team of OpenMP threads there would be more threads than cores. Those of the inference thread then
    sleep after each operation instead of waiting for the next one, which doubles its time.
    """
    torch.set_num_threads(1)


def read(folder: Path, device: str, dtype: str) -> Model:
    """Load a folder. Raises as `bardlet.load` does."""
    leave_the_cores()
    model = load(folder, device=device, dtype=cast(DType, dtype))
    if in_training(folder):
        try:
            newest = checkpoint.newest_intact(folder)
            weights = hf.read_tensors(newest / "model.safetensors")
            model.module.load_hf_state_dict({name: tensor.float() for name, tensor in weights.items()})
        except BardletError as error:  # the run has just replaced it: the weights at its root are whole all the same
            log.warning("%s; serving the weights of the run folder", error)
    return model


def add(engine: Engine, model: Model, cache_bytes: int) -> EngineModel:
    """Make a model ready for the engine."""
    leave_the_cores()
    return engine.add(model.module.eval(), torch.int8 if model.dtype == "int8" else None, cache_bytes)


def weight_bytes(model: Model) -> int:
    """Return the bytes of the weights of a model and of its decoder, which has them in another order.

    The compiled step has one copy; PyTorch's decoders have one for several rows and one for a single row.
    """
    parameters = list(model.module.parameters())
    if model.dtype == "int8" and native.is_there():  # a byte each, and a scale per 32 of them
        return sum(p.numel() * p.element_size() + p.numel() * 17 // 16 for p in parameters)
    return (2 if native.is_there() else 3) * sum(p.numel() * p.element_size() for p in parameters)


def in_training(folder: Path) -> bool:
    """Return True if a process trains the run and has saved a checkpoint."""
    if not (folder / "run.toml").is_file() or not checkpoint.steps_saved(folder):
        return False
    try:
        return lock.holder(folder) is not None
    except BardletError:
        return False
