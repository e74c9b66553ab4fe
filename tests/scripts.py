"""Scripts of examples/ as modules, and beside their rungs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bardlet import models
from bardlet.config.pretraining import TrainConfig
from bardlet.ladder.rungs import LADDER, LECTURE, SMALL
from bardlet.training import optim, optimizers

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str, **settings: Any) -> ModuleType:
    """Import a script, which trains nothing, and replace its settings."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for setting, value in settings.items():
        assert hasattr(module, setting) or (name, setting) == ("bigram", "n_embd")
        setattr(module, setting, value)
    return module


def rung(number: int, steps: int, sizes: dict[str, Any]) -> tuple[TrainConfig, nn.Module]:
    """Return the settings and an untrained model of a rung."""
    settings = {**SMALL, **LECTURE, **LADDER[number - 1].settings, **sizes, "steps": steps}
    config = TrainConfig(text=("x",), model=LADDER[number - 1].model, dtype="fp32", **settings).resolved()  # type: ignore[arg-type]
    torch.manual_seed(1337)
    return config, models.build(config.model_config(65)).train()


def train(model: nn.Module, loss: Any, optimizers: list[torch.optim.Optimizer], batches: Tensor) -> list[float]:
    """Train on batches (steps, B, T + 1); return the losses. The seed of each step fixes its dropout."""
    losses = []
    for step, batch in enumerate(batches, start=1):
        torch.manual_seed(step)
        value = loss(batch[:, :-1], batch[:, 1:])
        value.backward()
        losses.append(value.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


def assert_same_losses(name: str, number: int, steps: int, sizes: dict[str, Any],
                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a script's model and its rung from the same weights on the same batches: equal bits at each step.

    AdamW is the lecture's for both; Muon with its AdamW is each one's own, in fp32.
    """
    monkeypatch.setattr(optimizers, "pick_dtype", lambda dtype, device: "fp32")
    example = load(name, **{key: value for key, value in sizes.items() if name != "bigram" or key[0] == "b"})
    config, theirs = rung(number, steps, sizes)
    mine = example.Bigram(65) if name == "bigram" else example.GPT(65)
    mine.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    batches = torch.randint(65, (steps, sizes["batch_size"], sizes["block_size"] + 1))
    muon = config.optimizer == "muon"
    ours = example.optimizers(mine) if muon else [torch.optim.AdamW(mine.parameters(), lr=config.lr)]
    others = optim.build(theirs, config) if muon else [torch.optim.AdamW(theirs.parameters(), lr=config.lr)]
    losses = train(mine, lambda x, y: mine(x, y)[1], ours, batches)
    assert losses == train(theirs, lambda x, y: theirs(x, y.contiguous()) / y.numel(), others, batches)
    assert losses[-1] != losses[0]
    for (key, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), key
